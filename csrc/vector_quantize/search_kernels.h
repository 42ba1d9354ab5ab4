// The searches for a nearest code, compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fastldm/box_tree.h"
#include "fastldm/code_screen.h"
#include "fastldm/narrow_screen.h"
#include "fastldm/tile.h"

namespace fastldm {

// Depths that the searches for narrow latents are compiled for: 1 to this.
constexpr int64_t kMaxNarrowDepth = 8;

// Each takes latents [depth, kTile], of which the first `count`, without NaN, and writes as many
// indices.
struct SearchKernels {
  const char* name;
  int lanes;  // floats in a register
  void (*box_tree)(const BoxTreeView& tree, const float* latents, int64_t count, int32_t* index);
  void (*narrow_screen)(const NarrowScreenView& screen, const float* latents, int64_t count,
                        int32_t* index);
  // scratch: [kTile * (depth + blocks)]; index: -1 where the latent is to be searched exhaustively
  void (*code_screen)(const CodeScreenView& screen, const float* latents, int64_t count,
                      float* scratch, int32_t* index);
  // index: [kTile]
  void (*exhaustive)(const float* codebook, int64_t num_codes, int64_t depth, const float* latents,
                     int64_t count, int32_t* index);
  void (*exhaustive64)(const double* codebook, int64_t num_codes, int64_t depth,
                       const double* latents, int64_t count, int64_t* index);
};

// Null where this build or this processor does not have the instruction set.
const SearchKernels* avx512_kernels();
const SearchKernels* avx2_kernels();
const SearchKernels* portable_kernels();

// Those of this processor, the fastest first.
std::vector<const SearchKernels*> usable_search_kernels();

// The fastest, unless another one has been asked for.
const SearchKernels& search_kernels();

// For tests, which have every version tried on one processor.
// Throws std::invalid_argument where this processor has no such instruction set.
void use_search_kernels(const std::string& name);

}  // namespace fastldm
