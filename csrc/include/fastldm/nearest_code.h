// Search for the nearest codebook entry, vectorised over the latents of a tile.
//
// The distance of latent z and code e is the sum over d, in order, of (z_d - e_d)^2. This file is
// compiled without contraction to fused multiply-add, so every instruction set gives the same bits
// as the reference in torch, and a tie is a tie everywhere.
#pragma once

#include <cstdint>
#include <limits>

#include "fastldm/multiversion.h"

namespace fastldm {

// Latents of one tile; the accumulators of a tile are to stay in registers.
constexpr int kTile = 32;

// A tile's latents, transposed: element d of latent p at latents[d * kTile + p].
//   codebook: [num_codes, depth]
//   best:     [kTile] smallest distance of each latent; infinity where no distance is finite
//   index:    [kTile] the lowest index that has it; 0 where no distance is finite
//
// Written with the compilers' vector types, which become registers of whatever width the target
// has: left to the loop vectoriser, the accumulators go to memory at every d.
template <typename T, typename Index>
FASTLDM_INLINE void nearest_codes_of_tile(const T* latents, const T* codebook, int64_t num_codes,
                                          int64_t depth, T* best_out, Index* index_out) {
  static_assert(sizeof(T) == sizeof(Index));
  constexpr int kLanes = 32 / sizeof(T);
  constexpr int kVectors = kTile / kLanes;
  typedef T Vector __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  typedef Index IndexVector __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));

  Vector best[kVectors];
  IndexVector index[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    best[v] = Vector{} + std::numeric_limits<T>::infinity();
    index[v] = IndexVector{};
  }
  for (int64_t k = 0; k < num_codes; ++k) {
    const T* code = codebook + k * depth;
    Vector distance[kVectors] = {};
    for (int64_t d = 0; d < depth; ++d) {
      const Vector* z = reinterpret_cast<const Vector*>(latents + d * kTile);
      for (int v = 0; v < kVectors; ++v) {
        const Vector difference = z[v] - code[d];
        distance[v] += difference * difference;
      }
    }
    const IndexVector candidate = IndexVector{} + static_cast<Index>(k);
    for (int v = 0; v < kVectors; ++v) {
      const IndexVector nearer = distance[v] < best[v];
      best[v] = nearer ? distance[v] : best[v];
      index[v] = nearer ? candidate : index[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    reinterpret_cast<Vector*>(best_out)[v] = best[v];
    reinterpret_cast<IndexVector*>(index_out)[v] = index[v];
  }
}

}  // namespace fastldm
