// Nearest codebook entry of wide latents: a matrix product leaves few codes to measure exactly.
//
// With a centre c, z' = z - c and e' = e - c, the squared distance is |z'|^2 - 2 s for the score
// s = z'.e' - |e'|^2 / 2. The scores of a tile of latents and a panel of codes are one small
// matrix product, of which only the largest score of each block of codes is kept. The expanded
// form cancels, so it does not choose: every code whose score could, by the bound below, belong to
// the nearest is measured as the specification says, and the lowest index wins a tie. The answer
// is that of the exhaustive search to the bit.
//
// The bound. With u = 2^-24 and M no less than any |e'|: rounding z', e', |e'|^2 / 2 and the chain
// of D multiply-adds changes a score by at most E = (D + 3) u (|z'| M + M^2). A distance as
// specified is (1 + t) times the true one, |t| <= (D + 2) u =: g. Let b have the largest score S
// and w be the code that the specification chooses. From |z'|^2 - 2 s_w <= (|z'|^2 - 2 s_b)(1 + g)
// / (1 - g) follows that the score found for w is at least
//   S - 2 E - (1 + g) g (|z'|^2 - 2 S + 2 E),
// and `screen_margin` is that slack, enlarged for its own rounding and for underflow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__CUDACC__)
#define FASTLDM_HOST_DEVICE __host__ __device__
#else
#define FASTLDM_HOST_DEVICE
#endif

namespace fastldm {

constexpr float kUnitRoundoff = 0x1p-24f;

// How far below the largest score that of the chosen code may lie. Not finite, or past the range
// of float, where no bound can be given; then every code is a candidate.
//   latent_norm, code_norm: |z'| and M
FASTLDM_HOST_DEVICE inline float screen_margin(int64_t depth, float latent_norm, float code_norm,
                                               float largest_score) {
  const float unit = static_cast<float>(depth + 3) * kUnitRoundoff;
  const float score_error = unit * (latent_norm * code_norm + code_norm * code_norm);
  const float distance = latent_norm * latent_norm - 2 * largest_score + 2 * score_error;
  const float slack = 2 * score_error + unit * (distance > 0 ? distance : 0);
  return 1.25f * slack + static_cast<float>(depth) * 1e-37f;
}

// Channel d of the centre: any will do, and one amid the codes makes the margin small.
FASTLDM_HOST_DEVICE inline float screen_centre(const float* codebook, int64_t num_codes,
                                               int64_t depth, int64_t d) {
  const int64_t samples = num_codes < 64 ? num_codes : 64;
  float sum = 0;
  for (int64_t i = 0; i < samples; ++i)
    sum += codebook[i * num_codes / samples * depth + d] / static_cast<float>(samples);
  return sum;
}

// No less than |v|, from a rounded sum of `depth` squares of its elements.
FASTLDM_HOST_DEVICE inline float norm_bound(float sum_of_squares, int64_t depth) {
  return sqrtf(sum_of_squares) * (1.0f + static_cast<float>(depth + 16) * kUnitRoundoff);
}

// Whether the margin bounds anything: not where it comes of NaN, infinity or overflow.
FASTLDM_HOST_DEVICE inline bool is_bounded(float latent_norm, float code_norm, float margin) {
  return (latent_norm < 1e15f) & (code_norm < 1e15f) & (margin < 1e37f);
}

// What a search reads. Codes are in panels of `panel` codes, panels in blocks; lanes beyond the
// last code score minus infinity.
struct CodeScreenView {
  int64_t num_codes = 0, depth = 0, panels = 0, panels_of_block = 1;
  const float* codebook = nullptr;           // [num_codes, depth]
  const float* centre = nullptr;             // [depth]
  const float* centred = nullptr;            // [panels, depth, panel]
  const float* minus_half_square = nullptr;  // [panels, panel]
  float code_norm = 0;

  int64_t blocks() const { return (panels + panels_of_block - 1) / panels_of_block; }
};

class CodeScreen {
 public:
  // codebook: [num_codes, depth] without NaN.
  // run(count, task): calls task(i) for every i below count, in any order or at once.
  template <typename Run>
  CodeScreen(const float* codebook, int64_t num_codes, int64_t depth, int panel, Run run) {
    view_.num_codes = num_codes;
    view_.depth = depth;
    view_.codebook = codebook;
    view_.panels = (num_codes + panel - 1) / panel;
    // A candidate's block is scored again, so its size is a compromise between that and the
    // reductions that keep one score a block.
    view_.panels_of_block = std::max<int64_t>(1, 32 / depth);
    centre_.resize(depth);
    for (int64_t d = 0; d < depth; ++d) centre_[d] = screen_centre(codebook, num_codes, depth, d);
    centred_.resize(view_.panels * depth * panel);
    minus_half_square_.resize(view_.panels * panel);
    std::vector<double> squares(view_.panels, 0.0);
    run(view_.panels, [&](int64_t p) {
      float* to = centred_.data() + p * depth * panel;
      for (int lane = 0; lane < panel; ++lane) {
        const int64_t k = p * panel + lane;
        double square = 0;
        for (int64_t d = 0; d < depth; ++d) {
          const float value = k < num_codes ? codebook[k * depth + d] - centre_[d] : 0.0f;
          to[d * panel + lane] = value;
          square += static_cast<double>(value) * value;
        }
        minus_half_square_[p * panel + lane] = k < num_codes
                                                   ? static_cast<float>(-0.5 * square)
                                                   : -std::numeric_limits<float>::infinity();
        if (!(square <= squares[p])) squares[p] = square;
      }
    });
    double largest = 0;
    for (const double square : squares)
      if (!(square <= largest)) largest = square;
    view_.code_norm = norm_bound(static_cast<float>(largest), depth);
    view_.centre = centre_.data();
    view_.centred = centred_.data();
    view_.minus_half_square = minus_half_square_.data();
  }

  const CodeScreenView& view() const { return view_; }

 private:
  CodeScreenView view_;
  std::vector<float> centre_, centred_, minus_half_square_;
};

}  // namespace fastldm
