// The table of one instruction set's kernels, and no more; included after the target pragma.
#pragma once

#include "fastldm/box_tree_search.h"
#include "fastldm/code_screen_search.h"
#include "fastldm/exhaustive_search.h"
#include "fastldm/narrow_screen_search.h"
#include "vector_quantize/search_kernels.h"

namespace fastldm::FASTLDM_ISA {

template <int D = kMaxNarrowDepth>
void search_box_tree(const BoxTreeView& tree, const float* latents, int64_t count, int32_t* index) {
  if constexpr (D > 1) {
    if (tree.depth < D) return search_box_tree<D - 1>(tree, latents, count, index);
  }
  search_box_tree_of_depth<D>(tree, latents, count, index);
}

template <int D = kMaxNarrowDepth>
void search_narrow_screen(const NarrowScreenView& screen, const float* latents, int64_t count,
                          int32_t* index) {
  if constexpr (D > 1) {
    if (screen.depth < D) return search_narrow_screen<D - 1>(screen, latents, count, index);
  }
  search_narrow_screen_of_depth<D>(screen, latents, count, index);
}

const SearchKernels* table() {
  static constexpr SearchKernels kTable = {
      FASTLDM_ISA_NAME,
      kFloats,
      &search_box_tree<>,
      &search_narrow_screen<>,
      &search_code_screen,
      &search_exhaustively<float, int32_t>,
      &search_exhaustively<double, int64_t>,
  };
  return &kTable;
}

}  // namespace fastldm::FASTLDM_ISA
