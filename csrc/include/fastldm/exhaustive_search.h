// Nearest codebook entry by measuring every one, vectorised over the latents; see simd.h for how
// it is included.
//
// The distance of latent z and code e is the sum over d, in order, of (z_d - e_d)^2, each
// operation rounded. These files are compiled without contraction to fused multiply-add, so every
// instruction set gives the same bits as the reference in torch, and a tie is a tie everywhere.
#pragma once

#include "fastldm/simd.h"
#include "fastldm/tile.h"

namespace fastldm::FASTLDM_ISA {

// kWidth latents of [depth, kTile]. Their accumulators are to stay in registers: left to the loop
// vectoriser, they go to memory at every d.
template <typename T, typename Index>
struct ExhaustiveTile {
  static_assert(sizeof(T) == sizeof(Index));
  static constexpr int kLanes = kRegisterBytes / sizeof(T);
  static constexpr int kVectors = kRegisterBytes == 64 ? 2 : 4;
  static constexpr int kWidth = kVectors * kLanes;
  typedef T Values __attribute__((vector_size(kRegisterBytes), aligned(sizeof(T)), may_alias));
  typedef Index Indices
      __attribute__((vector_size(kRegisterBytes), aligned(sizeof(Index)), may_alias));

  // index: [kWidth] the lowest index of the smallest distance; 0 where no distance is finite.
  static FASTLDM_INLINE void search(const T* latents, const T* codebook, int64_t num_codes,
                                    int64_t depth, Index* index_out) {
    Values best[kVectors];
    Indices index[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      best[v] = Values{} + static_cast<T>(__builtin_inff());
      index[v] = Indices{};
    }
    for (int64_t k = 0; k < num_codes; ++k) {
      const T* code = codebook + k * depth;
      Values distance[kVectors] = {};
      for (int64_t d = 0; d < depth; ++d) {
        const Values* z = reinterpret_cast<const Values*>(latents + d * kTile);
        for (int v = 0; v < kVectors; ++v) {
          const Values difference = z[v] - code[d];
          distance[v] += difference * difference;
        }
      }
      const Indices candidate = Indices{} + static_cast<Index>(k);
      for (int v = 0; v < kVectors; ++v) {
        const Indices nearer = distance[v] < best[v];
        best[v] = nearer ? distance[v] : best[v];
        index[v] = nearer ? candidate : index[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<Indices*>(index_out)[v] = index[v];
  }
};

// latents: [depth, kTile], of which the first `count`. index: [kTile], the rest of it not used.
template <typename T, typename Index>
void search_exhaustively(const T* codebook, int64_t num_codes, int64_t depth, const T* latents,
                         int64_t count, Index* index) {
  using Tile = ExhaustiveTile<T, Index>;
  static_assert(kTile % Tile::kWidth == 0);
  for (int64_t first = 0; first < count; first += Tile::kWidth)
    Tile::search(latents + first, codebook, num_codes, depth, index + first);
}

}  // namespace fastldm::FASTLDM_ISA
