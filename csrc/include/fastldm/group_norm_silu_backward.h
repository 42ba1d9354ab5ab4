// The gradients of GroupNorm + SiLU on one processor core; names as in group_norm_silu.h.
//
// With n = (h - mean) rstd, p = n gain + offset and g = dy silu'(p), three sums over the pixels of
// a channel give everything: G = sum g, N = sum g n and X = sum n. Over a group of size m,
//     dh = rstd (gain g - (sum gain G + n sum gain N)/m)
// and its sum over a channel's pixels is that of channel_add. The other gradients are
//     dshift = G   dscale = weight N + bias G   dweight, dbias = sum over b of (1 + scale) N, G.
// g and n are computed twice rather than kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastldm/group_norm_silu.h"

namespace fastldm::norm {

template <typename T>
struct BackwardOperands : Operands<T> {
  Source grad_y;
  const T* mean = nullptr;  // [B, groups], as is rstd
  const T* rstd = nullptr;
};

struct ChannelSums {
  double g = 0, gn = 0, n = 0;
};

// The two sums over a group, divided by its size.
struct GroupSums {
  double g = 0, gn = 0;

  template <typename T>
  FASTLDM_INLINE GroupSums(const BackwardOperands<T>& from, int64_t b, int64_t group,
                           const ChannelSums* of_sample) {
    const int64_t depth = from.group_channels();
    for (int64_t c = group * depth; c < (group + 1) * depth; ++c) {
      const double gain = from.gain(b, c);
      g += gain * of_sample[c].g;
      gn += gain * of_sample[c].gn;
    }
    g /= static_cast<double>(depth * from.pixels);
    gn /= static_cast<double>(depth * from.pixels);
  }
};

// g and n of `count` elements.
template <bool kFused, typename T, typename Values>
FASTLDM_INLINE void upstream(const T* __restrict__ h, const T* __restrict__ grad_y, Values mean,
                             Values rstd, Values gain, Values offset, bool with_silu,
                             const ExpLimits<T>& limits, int64_t count, T* __restrict__ g,
                             T* __restrict__ n) {
  if (with_silu) {
    for (int64_t i = 0; i < count; ++i) {
      const T normal = (h[i] - mean[i]) * rstd[i];
      n[i] = normal;
      g[i] = grad_y[i] *
             silu_derivative<kFused>(multiply_add<kFused>(normal, gain[i], offset[i]), limits);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      n[i] = (h[i] - mean[i]) * rstd[i];
      g[i] = grad_y[i];
    }
  }
}

// dh = g factor - (level + n slope)
template <bool kFused, typename T, typename Values>
FASTLDM_INLINE void downstream(const T* __restrict__ g, const T* __restrict__ n, Values factor,
                               Values level, Values slope, int64_t count, T* __restrict__ grad_x) {
  for (int64_t i = 0; i < count; ++i) {
    grad_x[i] =
        multiply_add<kFused>(g[i], factor[i], -multiply_add<kFused>(n[i], slope[i], level[i]));
  }
}

// Contiguous: a task is a group.
template <typename T>
struct ContiguousBackward {
  BackwardOperands<T> from;
  ChannelSums* sums;  // [B, C], zero
  Target grad_x;      // null where it is not wanted
  bool with_sum_of_n;

  template <bool kFused>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) T buffer[kRun], of_grad[kRun], g[kRun], n[kRun];
    const ExpLimits<T> limits;
    Loader<T> loader(from, kRun);
    const int64_t depth = from.group_channels(), size = depth * from.pixels;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / from.groups, channel = task % from.groups * depth;
      const int64_t base = (b * from.channels + channel) * from.pixels;
      const T mean = from.mean[task], rstd = from.rstd[task];
      T level = 0, slope = 0;
      for (const bool is_last : {false, true}) {
        if (is_last) {
          if (!grad_x.data) break;
          const GroupSums of_group(from, b, task % from.groups, sums + b * from.channels);
          level = static_cast<T>(rstd * of_group.g);
          slope = static_cast<T>(rstd * of_group.gn);
        }
        for (int64_t first = 0, count; first < size; first += count) {
          count = length_of_run(first, size, from.pixels);
          const T* h = load_run(from, loader, b, channel, first, count, buffer);
          const T* grad = read_upward(from.grad_y, base + first, count, of_grad);
          // Once a piece of h has been read, its place is free.
          T* to = is_last ? room(grad_x, base + first, buffer) : nullptr;
          const int64_t piece = std::min(count, from.pixels);
          int64_t c = channel + first / from.pixels;
          for (int64_t i = 0; i < count; i += piece, ++c) {
            const T gain = from.gain(b, c);
            upstream<kFused>(h + i, grad + i, Same<T>{mean}, Same<T>{rstd}, Same<T>{gain},
                             Same<T>{from.offset(b, c)}, from.silu, limits, piece, g, n);
            if (is_last) {
              downstream<kFused>(g, n, Same<T>{rstd * gain}, Same<T>{level}, Same<T>{slope}, piece,
                                 to + i);
              continue;
            }
            ChannelSums& of_channel = sums[b * from.channels + c];
            of_channel.g += sum(g, piece);
            of_channel.gn += sum_products(g, n, piece);
            if (with_sum_of_n) of_channel.n += sum(n, piece);
          }
          if (is_last) flush(to, grad_x, base + first, count);
        }
      }
    }
  }
};

// The statistics and parameters of a sample, one number a channel.
template <typename T>
struct ChannelRows {
  std::vector<T> mean, rstd, gain, offset;

  explicit ChannelRows(int64_t channels)
      : mean(channels), rstd(channels), gain(channels), offset(channels) {}

  FASTLDM_INLINE void fill(const BackwardOperands<T>& from, int64_t b) {
    for (int64_t c = 0; c < from.channels; ++c) {
      const int64_t group = b * from.groups + c / from.group_channels();
      mean[c] = from.mean[group];
      rstd[c] = from.rstd[group];
      gain[c] = from.gain(b, c);
      offset[c] = from.offset(b, c);
    }
  }
};

// A run of whole pixels at a time, of which g and n are made.
template <typename T>
class RowWalk {
 public:
  explicit RowWalk(const BackwardOperands<T>& operands)
      : rows(rows_of_run(operands.channels)),
        g(rows * operands.channels),
        n(g.size()),
        of_channel(operands.channels),
        from_(operands),
        loader_(operands, static_cast<int64_t>(g.size())),
        h_(operands.is_plain() ? 0 : g.size()),
        grad_(is_stored_as<T>(operands.grad_y.type) ? 0 : g.size()) {}

  // Whether this is the first call for the sample.
  FASTLDM_INLINE bool enter(int64_t b) {
    if (b == entered_) return false;
    of_channel.fill(from_, b);
    entered_ = b;
    return true;
  }

  template <bool kFused>
  FASTLDM_INLINE void make(int64_t b, int64_t first, int64_t count) {
    const int64_t channels = from_.channels, base = (b * from_.pixels + first) * channels;
    const T* h = load_rows(from_, loader_, b, first, count, h_.data());
    const T* grad = read_upward(from_.grad_y, base, count * channels, grad_.data());
    for (int64_t at = 0; at < count * channels; at += channels) {
      upstream<kFused, T, const T*>(
          h + at, grad + at, of_channel.mean.data(), of_channel.rstd.data(), of_channel.gain.data(),
          of_channel.offset.data(), from_.silu, limits_, channels, g.data() + at, n.data() + at);
    }
  }

  const int64_t rows;
  std::vector<T> g, n;
  ChannelRows<T> of_channel;

 private:
  const BackwardOperands<T>& from_;
  Loader<T> loader_;
  std::vector<T> h_, grad_;
  ExpLimits<T> limits_;
  int64_t entered_ = -1;
};

// Task: a block of pixels, summed channel by channel.
template <typename T>
struct ChannelsLastSums {
  BackwardOperands<T> from;
  Blocks blocks;
  T* sums;  // [B, blocks, 3, C], zero
  bool with_sum_of_n;

  template <bool kFused>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t channels = from.channels;
    RowWalk<T> walk(from);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks.per_sample, block = task % blocks.per_sample;
      const int64_t last = blocks.first(block) + blocks.count(block, from.pixels);
      T* to = sums + task * 3 * channels;
      walk.enter(b);
      for (int64_t first = blocks.first(block), count; first < last; first += count) {
        count = std::min(walk.rows, last - first);
        walk.template make<kFused>(b, first, count);
        add_columns(walk.g.data(), count, channels, to);
        add_column_products(walk.g.data(), walk.n.data(), count, channels, to + channels);
        if (with_sum_of_n) add_columns(walk.n.data(), count, channels, to + 2 * channels);
      }
    }
  }
};

// The sums of a sample, its blocks added in their order.
template <typename T>
void merge_blocks(const T* parts, int64_t blocks, int64_t channels, ChannelSums* sums) {
  for (int64_t block = 0; block < blocks; ++block, parts += 3 * channels) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c].g += parts[c];
      sums[c].gn += parts[channels + c];
      sums[c].n += parts[2 * channels + c];
    }
  }
}

// Task: a block of pixels.
template <typename T>
struct ChannelsLastBackward {
  BackwardOperands<T> from;
  Blocks blocks;
  const ChannelSums* sums;  // [B, C]
  Target grad_x;

  template <bool kFused>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t channels = from.channels;
    RowWalk<T> walk(from);
    std::vector<T> factor(channels), level(channels), slope(channels);
    std::vector<T> rounded(is_stored_as<T>(grad_x.type) ? 0 : walk.g.size());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks.per_sample, block = task % blocks.per_sample;
      const int64_t last = blocks.first(block) + blocks.count(block, from.pixels);
      if (walk.enter(b)) fill(walk.of_channel, b, factor.data(), level.data(), slope.data());
      for (int64_t first = blocks.first(block), count; first < last; first += count) {
        count = std::min(walk.rows, last - first);
        walk.template make<kFused>(b, first, count);
        const int64_t base = (b * from.pixels + first) * channels;
        T* to = room(grad_x, base, rounded.data());
        for (int64_t at = 0; at < count * channels; at += channels) {
          downstream<kFused, T, const T*>(walk.g.data() + at, walk.n.data() + at, factor.data(),
                                          level.data(), slope.data(), channels, to + at);
        }
        flush(to, grad_x, base, count * channels);
      }
    }
  }

  FASTLDM_INLINE void fill(const ChannelRows<T>& of_channel, int64_t b, T* factor, T* level,
                           T* slope) const {
    const int64_t depth = from.group_channels();
    for (int64_t group = 0; group < from.groups; ++group) {
      const GroupSums of_group(from, b, group, sums + b * from.channels);
      for (int64_t c = group * depth; c < (group + 1) * depth; ++c) {
        const T rstd = of_channel.rstd[c];
        factor[c] = rstd * of_channel.gain[c];
        level[c] = static_cast<T>(rstd * of_group.g);
        slope[c] = static_cast<T>(rstd * of_group.gn);
      }
    }
  }
};

// The gradients of what is given a channel; those not wanted are null.
template <typename T>
struct ParameterGradients {
  T *weight, *bias;                // [C]
  T *channel_add, *scale, *shift;  // [B, C]

  void fill(const BackwardOperands<T>& from, const ChannelSums* sums, int64_t c) const {
    double of_weight = 0, of_bias = 0;
    for (int64_t b = 0; b < from.batch; ++b) {
      const int64_t at = b * from.channels + c;
      const ChannelSums& of = sums[at];
      const double modulation = from.scale ? T(1) + from.scale[at] : T(1);
      of_weight += modulation * of.gn;
      of_bias += modulation * of.g;
      if (shift) shift[at] = static_cast<T>(of.g);
      if (scale) {
        scale[at] = static_cast<T>((from.weight ? from.weight[c] : T(1)) * of.gn +
                                   (from.bias ? from.bias[c] : T(0)) * of.g);
      }
      if (channel_add) {
        const int64_t group = c / from.group_channels();
        const GroupSums of_group(from, b, group, sums + b * from.channels);
        const double pixels = static_cast<double>(from.pixels);
        channel_add[at] =
            static_cast<T>(from.rstd[b * from.groups + group] *
                           (from.gain(b, c) * of.g - (pixels * of_group.g + of.n * of_group.gn)));
      }
    }
    if (weight) weight[c] = static_cast<T>(of_weight);
    if (bias) bias[c] = static_cast<T>(of_bias);
  }
};

}  // namespace fastldm::norm
