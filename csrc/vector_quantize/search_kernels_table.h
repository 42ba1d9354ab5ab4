// The table of one instruction set's kernels, and no more; included after the target pragma.
#pragma once

#include "fastldm/box_tree_search.h"
#include "fastldm/code_screen_search.h"
#include "fastldm/exhaustive_search.h"
#include "vector_quantize/search_kernels.h"

namespace fastldm::FASTLDM_ISA {

inline void search_box_tree(const BoxTreeView& tree, const float* latents, int64_t count,
                            int32_t* index) {
  switch (tree.depth) {
    case 1:
      return search_box_tree_of_depth<1>(tree, latents, count, index);
    case 2:
      return search_box_tree_of_depth<2>(tree, latents, count, index);
    case 3:
      return search_box_tree_of_depth<3>(tree, latents, count, index);
    case 4:
      return search_box_tree_of_depth<4>(tree, latents, count, index);
    case 5:
      return search_box_tree_of_depth<5>(tree, latents, count, index);
    case 6:
      return search_box_tree_of_depth<6>(tree, latents, count, index);
    case 7:
      return search_box_tree_of_depth<7>(tree, latents, count, index);
    default:
      return search_box_tree_of_depth<8>(tree, latents, count, index);
  }
}
static_assert(kMaxTreeDepth == 8);
static_assert(ExhaustiveTile<float, int32_t>::kWidth <= kExhaustiveScratch);
static_assert(ExhaustiveTile<double, int64_t>::kWidth <= kExhaustiveScratch);

const SearchKernels* table() {
  static constexpr SearchKernels kTable = {
      FASTLDM_ISA_NAME,
      kFloats,
      &search_box_tree,
      &search_code_screen,
      &search_exhaustively<float, int32_t>,
      &search_exhaustively<double, int64_t>,
  };
  return &kTable;
}

}  // namespace fastldm::FASTLDM_ISA
