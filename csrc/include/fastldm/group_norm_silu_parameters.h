// The gradients of GroupNorm's parameters from the sums of each channel, as
// group_norm_silu_backward.h says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastldm/group_norm_silu_backward.h"

namespace fastldm::norm {

// Task: the gradients of what is given a channel, for a group; those not wanted are null.
template <typename T>
struct ParameterGradients {
  BackwardOperands<T> from;
  ChannelSums sums;
  T *weight, *bias;                // [C]
  T *channel_add, *scale, *shift;  // [B, C]

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t depth = from.group_channels();
    std::vector<double> of_weight(depth), of_bias(depth);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * depth;
      std::fill(of_weight.begin(), of_weight.end(), 0);
      std::fill(of_bias.begin(), of_bias.end(), 0);
      for (int64_t b = 0; b < from.batch; ++b) {
        const int64_t at = b * from.channels + first;
        add(sums.from(at), from.scale ? from.scale + at : nullptr, depth, of_weight.data(),
            of_bias.data());
        if (shift) std::copy_n(sums.g + at, depth, shift + at);
        if (scale) fill_scale(sums.from(at), first, depth, scale + at);
        if (channel_add) fill_channel_add(b, group, channel_add + at);
      }
      if (weight) std::copy_n(of_weight.data(), depth, weight + first);
      if (bias) std::copy_n(of_bias.data(), depth, bias + first);
    }
  }

  static FASTLDM_INLINE void add(const ChannelSums& of, const T* scale, int64_t depth,
                                 double* __restrict__ of_weight, double* __restrict__ of_bias) {
    for (int64_t c = 0; c < depth; ++c) {
      const double modulation = scale ? T(1) + scale[c] : T(1);
      of_weight[c] += modulation * of.gn[c];
      of_bias[c] += modulation * of.g[c];
    }
  }

  FASTLDM_INLINE void fill_scale(const ChannelSums& of, int64_t first, int64_t depth,
                                 T* __restrict__ to) const {
    for (int64_t c = 0; c < depth; ++c) {
      to[c] = static_cast<T>((from.weight ? from.weight[first + c] : T(1)) * of.gn[c] +
                             (from.bias ? from.bias[first + c] : T(0)) * of.g[c]);
    }
  }

  FASTLDM_INLINE void fill_channel_add(int64_t b, int64_t group, T* __restrict__ to) const {
    const int64_t depth = from.group_channels(), first = group * depth;
    const ChannelSums of_sample = sums.from(b * from.channels), of = of_sample.from(first);
    const GroupSums of_group(from, b, group, of_sample);
    const double pixels = static_cast<double>(from.pixels);
    const double rstd = from.rstd[b * from.groups + group];
    for (int64_t c = 0; c < depth; ++c) {
      to[c] = static_cast<T>(rstd * (from.gain(b, first + c) * of.g[c] -
                                     (pixels * of_group.g + of.n[c] * of_group.gn)));
    }
  }
};

}  // namespace fastldm::norm
