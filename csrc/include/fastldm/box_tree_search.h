// The search through a BoxTree; see box_tree.h for why it is exact, simd.h for how it is included.
#pragma once

#include "fastldm/box_tree.h"
#include "fastldm/simd.h"
#include "fastldm/tile.h"

namespace fastldm::FASTLDM_ISA {

template <int D>
struct BoxTreeSearch {
  // The latents' own place in the tree at each level above the codes.
  struct Frame {
    float distance[kFloats];
    uint32_t pending;
    int64_t group;
  };

  const BoxTreeView& tree;
  Floats z[D];
  float best;
  int32_t best_index;
  Frame frames[kMaxLevels];

  FASTLDM_INLINE Floats distances_to_codes(int64_t group) const {
    const float* code = tree.codes + group * D * kFloats;
    Floats sum = {};
    for (int d = 0; d < D; ++d) {
      const Floats difference = z[d] - load(code + d * kFloats);
      sum += difference * difference;
    }
    return sum;
  }

  FASTLDM_INLINE Floats distances_to_boxes(int level, int64_t group) const {
    const float* low = tree.bounds[level] + group * 2 * D * kFloats;
    const float* high = low + D * kFloats;
    Floats sum = {};
    for (int d = 0; d < D; ++d) {
      const Floats below = load(low + d * kFloats) - z[d];
      const Floats above = z[d] - load(high + d * kFloats);
      // In this order NaN, a lane without a box, stays NaN.
      const Floats gap = maximum(Floats{}, maximum(below, above));
      sum += gap * gap;
    }
    return sum;
  }

  FASTLDM_INLINE void visit_codes(int64_t group) {
    const Floats distance = distances_to_codes(group);
    if (lanes_at_most(distance, broadcast(best)) == 0) return;
    const float nearest = smallest(distance);
    // Indices ascend in a group, so the first lane has the lowest.
    const int lane = __builtin_ctz(lanes_at_most(distance, broadcast(nearest)));
    const int32_t index = tree.index[group * kFloats + lane];
    if (nearest < best || index < best_index) {
      best = nearest;
      best_index = index;
    }
  }

  FASTLDM_INLINE Floats open(int level, int64_t group) {
    const Floats distance = distances_to_boxes(level, group);
    store(frames[level].distance, distance);
    frames[level].group = group;
    return distance;
  }

  FASTLDM_INLINE void run() {
    best = __builtin_inff();
    best_index = 0;
    int64_t group = 0;
    for (int level = tree.levels - 1; level >= 0; --level) {
      const Floats distance = open(level, group);
      const int lane = __builtin_ctz(lanes_at_most(distance, broadcast(smallest_box(distance))));
      frames[level].pending = ~(1u << lane);
      group = group * kFloats + lane;
    }
    visit_codes(group);
    int level = 0;
    while (level < tree.levels) {
      Frame& frame = frames[level];
      const uint32_t near = frame.pending & lanes_at_most(load(frame.distance), broadcast(best));
      if (near == 0) {
        ++level;
        continue;
      }
      const int lane = __builtin_ctz(near);
      frame.pending = near & (near - 1);
      const int64_t child = frame.group * kFloats + lane;
      if (level == 0) {
        visit_codes(child);
      } else {
        open(--level, child);
        frames[level].pending = ~0u;
      }
    }
  }

  // Lanes without a box are NaN and must not win.
  FASTLDM_INLINE float smallest_box(Floats distance) const {
    const Floats infinity = broadcast(__builtin_inff());
    return smallest(distance < infinity ? distance : infinity);
  }
};

// latents: [D, kTile], of which the first `count`.
template <int D>
void search_box_tree_of_depth(const BoxTreeView& tree, const float* latents, int64_t count,
                              int32_t* index) {
  BoxTreeSearch<D> search{tree};
  for (int64_t n = 0; n < count; ++n) {
    bool finite = true;
    for (int d = 0; d < D; ++d) {
      const float value = latents[d * kTile + n];
      finite &= value - value == 0;
      search.z[d] = broadcast(value);
    }
    // From an infinite latent no distance is finite, and index 0 stands for that.
    index[n] = 0;
    if (!finite) continue;
    search.run();
    index[n] = search.best_index;
  }
}

}  // namespace fastldm::FASTLDM_ISA
