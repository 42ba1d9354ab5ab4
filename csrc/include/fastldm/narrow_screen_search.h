// The search through a NarrowScreen; see narrow_screen.h for why it is exact, simd.h for how it is
// included.
#pragma once

#include "fastldm/narrow_screen.h"
#include "fastldm/simd.h"
#include "fastldm/tile.h"

namespace fastldm::FASTLDM_ISA {

// Latents whose scores of two codes are in registers at once.
constexpr int kNarrowVectors = kRegisterBytes == 64 ? 2 : 4;
constexpr int kNarrowWidth = kNarrowVectors * kFloats;
static_assert(kTile % kNarrowWidth == 0);

template <int D>
struct NarrowScreenSearch {
  const NarrowScreenView& screen;

  // Distances as specified to the codes of one chunk: the nearest replaces one that is farther, or
  // as far and of a higher index.
  FASTLDM_INLINE void measure(int64_t chunk, const float* latents, float& best,
                              int32_t& index) const {
    constexpr int kParts = kChunk / kFloats;
    Floats sums[kParts] = {};
    for (int d = 0; d < D; ++d) {
      const Floats z = broadcast(latents[d * kTile]);
      const float* code = screen.codes + (chunk * D + d) * kChunk;
      for (int part = 0; part < kParts; ++part) {
        const Floats difference = z - load(code + part * kFloats);
        sums[part] += difference * difference;
      }
    }
    Floats least = sums[0];
    for (int part = 1; part < kParts; ++part) least = sums[part] < least ? sums[part] : least;
    const float nearest = smallest(least);
    if (!(nearest < best)) return;
    uint32_t lanes = 0;
    for (int part = 0; part < kParts; ++part)
      lanes |= lanes_at_most(sums[part], broadcast(nearest)) << part * kFloats;
    best = nearest;
    index = static_cast<int32_t>(chunk * kChunk) + __builtin_ctz(lanes);
  }

  // Largest scores of one chunk for kNarrowWidth centred latents.
  FASTLDM_INLINE void score(int64_t chunk, const float* centred, Floats* most) const {
    const float* code = screen.centred + chunk * kChunk * (D + 1);
    for (int v = 0; v < kNarrowVectors; ++v) most[v] = broadcast(-__builtin_inff());
    for (int k = 0; k < kChunk; k += 2, code += 2 * (D + 1)) {
      Floats first[kNarrowVectors], second[kNarrowVectors];
      for (int v = 0; v < kNarrowVectors; ++v) {
        first[v] = broadcast(code[D]);
        second[v] = broadcast(code[2 * D + 1]);
      }
      for (int d = 0; d < D; ++d) {
        const Floats a = broadcast(code[d]), b = broadcast(code[D + 1 + d]);
        for (int v = 0; v < kNarrowVectors; ++v) {
          const Floats z = load(centred + d * kNarrowWidth + v * kFloats);
          first[v] = multiply_add(z, a, first[v]);
          second[v] = multiply_add(z, b, second[v]);
        }
      }
      for (int v = 0; v < kNarrowVectors; ++v)
        most[v] = maximum(first[v], maximum(second[v], most[v]));
    }
  }

  // latents: [D, kTile], of which the first kNarrowWidth. index: [count].
  FASTLDM_INLINE void search(const float* latents, int64_t count, int32_t* index) const {
    float centred[D * kNarrowWidth], squares[kNarrowWidth] = {};
    for (int d = 0; d < D; ++d) {
      for (int i = 0; i < kNarrowWidth; ++i) {
        const float value = latents[d * kTile + i] - screen.centre[d];
        centred[d * kNarrowWidth + i] = value;
        squares[i] += value * value;
      }
    }
    Floats top[kNarrowVectors], second[kNarrowVectors];
    Ints chunk_of[kNarrowVectors];
    for (int v = 0; v < kNarrowVectors; ++v) {
      top[v] = second[v] = broadcast(-__builtin_inff());
      chunk_of[v] = Ints{};
    }
    for (int64_t chunk = 0; chunk < screen.chunks; ++chunk) {
      Floats most[kNarrowVectors];
      score(chunk, centred, most);
      const Ints number = Ints{} + static_cast<int32_t>(chunk);
      for (int v = 0; v < kNarrowVectors; ++v) {
        const Ints larger = most[v] > top[v];
        second[v] = larger ? top[v] : maximum(most[v], second[v]);
        chunk_of[v] = larger ? number : chunk_of[v];
        top[v] = larger ? most[v] : top[v];
      }
    }
    float tops[kNarrowWidth], seconds[kNarrowWidth];
    int32_t chunks[kNarrowWidth];
    for (int v = 0; v < kNarrowVectors; ++v) {
      store(tops + v * kFloats, top[v]);
      store(seconds + v * kFloats, second[v]);
      __builtin_memcpy(chunks + v * kFloats, &chunk_of[v], sizeof(Ints));
    }
    int32_t decided[kNarrowWidth];
    for (int i = 0; i < kNarrowWidth; ++i) {
      const float norm = norm_bound(squares[i], D);
      const float margin = screen_margin(D, norm, screen.code_norm, tops[i]);
      decided[i] = is_bounded(norm, screen.code_norm, margin) & (seconds[i] < tops[i] - margin);
    }
    for (int64_t n = 0; n < count; ++n) {
      float best = __builtin_inff();
      index[n] = 0;
      if (decided[n]) {
        measure(chunks[n], latents + n, best, index[n]);
      } else {
        for (int64_t chunk = 0; chunk < screen.chunks; ++chunk)
          measure(chunk, latents + n, best, index[n]);
      }
    }
  }
};

// latents: [D, kTile], of which the first `count`.
template <int D>
void search_narrow_screen_of_depth(const NarrowScreenView& screen, const float* latents,
                                   int64_t count, int32_t* index) {
  const NarrowScreenSearch<D> search{screen};
  for (int64_t first = 0; first < count; first += kNarrowWidth)
    search.search(latents + first, count - first < kNarrowWidth ? count - first : kNarrowWidth,
                  index + first);
}

}  // namespace fastldm::FASTLDM_ISA
