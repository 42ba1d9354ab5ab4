// The search through a CodeScreen; see code_screen.h for why it is exact, simd.h for how it is
// included.
#pragma once

#include "fastldm/code_screen.h"
#include "fastldm/simd.h"
#include "fastldm/tile.h"

namespace fastldm::FASTLDM_ISA {

constexpr int kPanel = 2 * kFloats;
// Latents whose scores are in registers at once: 12 accumulators of 16 registers.
constexpr int kRows = 6;
static_assert(kTile % kRows == 0);

struct Scores {
  Floats low, high;
};

// Scores of one panel for `R` centred latents; latents: [depth, kRows].
template <int R>
FASTLDM_INLINE void score_panel(const float* latents, const float* centred,
                                const float* minus_half_square, int64_t depth, Scores* scores) {
  for (int r = 0; r < R; ++r)
    scores[r] = {load(minus_half_square), load(minus_half_square + kFloats)};
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    const Floats low = load(centred + d * kPanel), high = load(centred + d * kPanel + kFloats);
    for (int r = 0; r < R; ++r) {
      const Floats z = broadcast(latents[d * kRows + r]);
      scores[r].low = multiply_add(z, low, scores[r].low);
      scores[r].high = multiply_add(z, high, scores[r].high);
    }
  }
}

// The distance as specified: differences squared and added in order, each rounded.
// latent: elements kTile apart.
inline float exact_distance(const float* latent, const float* code, int64_t depth) {
  float sum = 0;
  for (int64_t d = 0; d < depth; ++d) {
    const float difference = latent[d * kTile] - code[d];
    sum += difference * difference;
  }
  return sum;
}

// Nearest code of one latent among those whose score is at least `threshold`; -1 if they are too
// many to measure here.
inline int32_t nearest_candidate(const CodeScreenView& screen, const float* latent,
                                 const float* centred_latent, const float* block_scores,
                                 float threshold) {
  const auto distance_to = [&](int64_t k) {
    return exact_distance(latent, screen.codebook + k * screen.depth, screen.depth);
  };
  // One measured alone takes as long as 32 in the vectors of the exhaustive search.
  const int64_t most_candidates = 8 + screen.num_codes / 32;
  float best = 0;
  int64_t best_index = 0, candidates = 0;
  const int64_t blocks = screen.blocks();
  for (int64_t block = 0; block < blocks; ++block) {
    if (!(block_scores[block] >= threshold)) continue;
    const int64_t first = block * screen.panels_of_block;
    const int64_t last = first + screen.panels_of_block < screen.panels
                             ? first + screen.panels_of_block
                             : screen.panels;
    for (int64_t panel = first; panel < last; ++panel) {
      Scores scores;
      score_panel<1>(centred_latent, screen.centred + panel * screen.depth * kPanel,
                     screen.minus_half_square + panel * kPanel, screen.depth, &scores);
      uint32_t near = lanes_at_most(broadcast(threshold), scores.low) |
                      lanes_at_most(broadcast(threshold), scores.high) << kFloats;
      for (; near != 0; near &= near - 1) {
        const int64_t k = panel * kPanel + __builtin_ctz(near);
        if (++candidates == 1) {
          best_index = k;
          continue;
        }
        if (candidates > most_candidates) return -1;
        if (candidates == 2) best = distance_to(best_index);
        const float distance = distance_to(k);
        if (distance < best) {
          best = distance;
          best_index = k;
        }
      }
    }
  }
  return static_cast<int32_t>(best_index);
}

// Centres latents [depth, kTile] into groups of kRows, [kTile / kRows, depth, kRows], with the sum
// of squares of each.
inline void centre_latents(const CodeScreenView& screen, const float* latents, float* centred,
                           float* squares) {
  for (int n = 0; n < kTile; ++n) squares[n] = 0;
  for (int64_t d = 0; d < screen.depth; ++d) {
    float row[kTile];
    for (int n = 0; n < kTile; ++n) {
      row[n] = latents[d * kTile + n] - screen.centre[d];
      squares[n] += row[n] * row[n];
    }
    for (int group = 0; group < kTile / kRows; ++group)
      __builtin_memcpy(centred + (group * screen.depth + d) * kRows, row + group * kRows,
                       kRows * sizeof(float));
  }
}

// latents: [depth, kTile], of which the first `count`. scratch: [kTile * (depth + blocks)]. index:
// [count], -1 where the latent is to be searched exhaustively.
inline void search_code_screen(const CodeScreenView& screen, const float* latents, int64_t count,
                               float* scratch, int32_t* index) {
  const int64_t depth = screen.depth, blocks = screen.blocks();
  float* centred = scratch;
  float* block_scores = scratch + kTile * depth;
  float squares[kTile];
  centre_latents(screen, latents, centred, squares);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * screen.panels_of_block;
    const int64_t last = first + screen.panels_of_block < screen.panels
                             ? first + screen.panels_of_block
                             : screen.panels;
    for (int64_t n = 0; n < count; n += kRows) {
      Floats most[kRows];
      for (int r = 0; r < kRows; ++r) most[r] = broadcast(-__builtin_inff());
      for (int64_t panel = first; panel < last; ++panel) {
        Scores scores[kRows];
        score_panel<kRows>(centred + n * depth, screen.centred + panel * depth * kPanel,
                           screen.minus_half_square + panel * kPanel, depth, scores);
        for (int r = 0; r < kRows; ++r)
          most[r] = maximum(maximum(scores[r].low, scores[r].high), most[r]);
      }
      for (int r = 0; r < kRows; ++r) block_scores[(n + r) * blocks + block] = largest(most[r]);
    }
  }

  for (int64_t n = 0; n < count; ++n) {
    const float norm = norm_bound(squares[n], depth);
    const float* scores = block_scores + n * blocks;
    float top = -__builtin_inff();
    for (int64_t block = 0; block < blocks; ++block)
      top = scores[block] > top ? scores[block] : top;
    const float margin = screen_margin(depth, norm, screen.code_norm, top);
    const float threshold = top - margin;
    index[n] =
        is_bounded(norm, screen.code_norm, margin)
            ? nearest_candidate(screen, latents + n,
                                centred + n / kRows * kRows * depth + n % kRows, scores, threshold)
            : -1;
  }
}

}  // namespace fastldm::FASTLDM_ISA
