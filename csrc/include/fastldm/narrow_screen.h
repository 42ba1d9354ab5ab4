// Nearest codebook entry of narrow latents without a tree: scores with a bound, as in
// code_screen.h, for a register of latents at once and one code after another.
//
// Of each latent are kept the largest score, the chunk of codes that has it, and the largest score
// of the other chunks. Where the latter is below the margin, the nearest code is in that chunk,
// and only its codes are measured as specified; where not, all codes are.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "fastldm/code_screen.h"

namespace fastldm {

// Codes of one chunk.
constexpr int kChunk = 16;

// What a search reads; codes past the last one score minus infinity and are infinitely far.
struct NarrowScreenView {
  int64_t chunks = 0, depth = 0;
  const float* centre = nullptr;   // [depth]
  const float* centred = nullptr;  // [chunks, kChunk, depth + 1]: a code, minus half its square
  const float* codes = nullptr;    // [chunks, depth, kChunk]
  float code_norm = 0;
};

class NarrowScreen {
 public:
  // codebook: [num_codes, depth] without NaN.
  NarrowScreen(const float* codebook, int64_t num_codes, int64_t depth) {
    view_.depth = depth;
    view_.chunks = (num_codes + kChunk - 1) / kChunk;
    const int64_t padded = view_.chunks * kChunk;
    for (int64_t d = 0; d < depth; ++d)
      centre_.push_back(screen_centre(codebook, num_codes, depth, d));
    centred_.assign(padded * (depth + 1), 0.0f);
    codes_.assign(padded * depth, std::numeric_limits<float>::infinity());
    double largest = 0;
    for (int64_t k = 0; k < padded; ++k) {
      double square = k < num_codes ? 0.0 : std::numeric_limits<double>::infinity();
      for (int64_t d = 0; d < depth && k < num_codes; ++d) {
        const float code = codebook[k * depth + d], value = code - centre_[d];
        codes_[(k / kChunk * depth + d) * kChunk + k % kChunk] = code;
        centred_[k * (depth + 1) + d] = value;
        square += static_cast<double>(value) * value;
      }
      centred_[k * (depth + 1) + depth] = static_cast<float>(-0.5 * square);
      if (k < num_codes && !(square <= largest)) largest = square;
    }
    view_.code_norm = norm_bound(static_cast<float>(largest), depth);
    view_.centre = centre_.data();
    view_.centred = centred_.data();
    view_.codes = codes_.data();
  }

  const NarrowScreenView& view() const { return view_; }

 private:
  NarrowScreenView view_;
  std::vector<float> centre_, centred_, codes_;
};

}  // namespace fastldm
