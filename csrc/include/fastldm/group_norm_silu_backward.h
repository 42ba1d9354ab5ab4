// The gradients of GroupNorm + SiLU on one processor core; names as in group_norm_silu.h.
//
// With n = (h - mean) rstd, p = n gain + offset and g = dy silu'(p), three sums over the pixels of
// a channel give everything: G = sum g, N = sum g n and X = sum n. Over a group of size m,
//     dh = rstd (gain g - (sum gain G + n sum gain N)/m)
// and its sum over a channel's pixels is that of channel_add. The other gradients are
//     dshift = G   dscale = weight N + bias G   dweight, dbias = sum over b of (1 + scale) N, G.
// Between the two passes g waits in the place of dh where it is not rounded there, and otherwise is
// computed again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastldm/group_norm_silu_channels_last.h"

namespace fastldm::norm {

template <typename T>
struct BackwardOperands : Operands<T> {
  Source grad_y;
  const T* mean = nullptr;  // [B, groups], as is rstd
  const T* rstd = nullptr;
};

// The sums of g, g n and n of each channel, [B, C].
struct ChannelSums {
  double *g = nullptr, *gn = nullptr, *n = nullptr;

  FASTLDM_INLINE ChannelSums from(int64_t channel) const {
    return {g + channel, gn + channel, n + channel};
  }
};

// The two sums over a group, divided by its size.
struct GroupSums {
  double g = 0, gn = 0;

  template <typename T>
  FASTLDM_INLINE GroupSums(const BackwardOperands<T>& from, int64_t b, int64_t group,
                           const ChannelSums& of_sample) {
    const int64_t depth = from.group_channels();
    for (int64_t c = group * depth; c < (group + 1) * depth; ++c) {
      const double gain = from.gain(b, c);
      g += gain * of_sample.g[c];
      gn += gain * of_sample.gn[c];
    }
    g /= static_cast<double>(depth * from.pixels);
    gn /= static_cast<double>(depth * from.pixels);
  }
};

// g of `count` elements; factor is rstd gain.
template <typename Processor, typename T, typename Values>
FASTLDM_INLINE void upstream(const T* __restrict__ h, const T* __restrict__ grad_y, Values mean,
                             Values factor, Values offset, bool with_silu,
                             const ExpLimits<T>& limits, int64_t count, T* __restrict__ g) {
  constexpr bool kFused = Processor::kFused;
  constexpr int kCount = kBlock<Processor, T>;
  if (!with_silu) {
    for (int64_t i = 0; i < count; ++i) g[i] = grad_y[i];
    return;
  }
  int64_t done = 0;
  for (; done + kCount <= count; done += kCount) {
    T p[kCount], derivative[kCount];
    normalise<kFused>(h, mean, factor, offset, done, kCount, p);
    silu_derivative<kFused, kCount>(p, limits, derivative);
    for (int i = 0; i < kCount; ++i) g[done + i] = grad_y[done + i] * derivative[i];
  }
  normalise<kFused>(h, mean, factor, offset, done, count - done, g + done);
  silu_gradient<Processor>(grad_y + done, count - done, limits, g + done);
}

// dh = g factor - ((h - mean) slope + level), in the place of g.
template <bool kFused, typename T, typename Values>
FASTLDM_INLINE void downstream(const T* __restrict__ h, Values mean, Values factor, Values slope,
                               Values level, int64_t count, T* __restrict__ g) {
  for (int64_t i = 0; i < count; ++i) {
    const T from_group = multiply_add<kFused>(h[i] - mean[i], slope[i], level[i]);
    g[i] = multiply_add<kFused>(g[i], factor[i], -from_group);
  }
}

// Whether g can wait in the place of dh.
template <typename T>
FASTLDM_INLINE bool keeps(const Target& grad_x) {
  return grad_x.data && is_stored_as<T>(grad_x.type);
}

// A contiguous run of whole channels, or of a part of one, of one group.
template <typename T>
struct ChannelRun {
  const T* h;
  T* g;
  int64_t pixels;
  T mean;
  const T* factor;  // [channels]
};

// Task: a channel of the run, whose g is computed, and added up where there are sums.
template <typename T>
struct ChannelUpstream : ChannelRun<T> {
  const T* grad_y;
  const T* offset;  // [channels]
  bool silu;
  ChannelSums sums;  // [channels], or null; of (h - mean) in place of n
  bool with_sum_of_n;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const ExpLimits<T> limits;
    const T mean = this->mean;
    const int64_t pixels = this->pixels;
    const bool is_short = silu && pixels < kBlock<Processor, T>;
    for (int64_t c = begin; c < end; ++c) {
      const T* h = this->h + c * pixels;
      T* g = this->g + c * pixels;
      const Same<T> centre{mean}, slope{this->factor[c]}, level{offset[c]};
      if (is_short) {
        normalise<Processor::kFused>(h, centre, slope, level, 0, pixels, g);
      } else {
        upstream<Processor>(h, grad_y + c * pixels, centre, slope, level, silu, limits, pixels, g);
      }
    }
    if (is_short) {
      const int64_t first = begin * pixels;
      silu_gradient<Processor>(grad_y + first, (end - begin) * pixels, limits, this->g + first);
    }
    if (!sums.g) return;
    for (int64_t c = begin; c < end; ++c) {
      const T* h = this->h + c * pixels;
      T of_g = 0, of_products = 0;
      sum_weighted<Processor>(this->g + c * pixels, h, pixels, mean, of_g, of_products);
      sums.g[c] += of_g;
      sums.gn[c] += of_products;
      if (!with_sum_of_n) continue;
      T of_distances = 0, of_squares = 0;
      sum_deviations<Processor>(h, pixels, mean, of_distances, of_squares);
      sums.n[c] += of_distances;
    }
  }
};

// Task: a channel of the run, whose dh takes the place of g.
template <typename T>
struct ChannelDownstream : ChannelRun<T> {
  T slope, level;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) {
      downstream<Processor::kFused>(this->h + c * this->pixels, Same<T>{this->mean},
                                    Same<T>{this->factor[c]}, Same<T>{slope}, Same<T>{level},
                                    this->pixels, this->g + c * this->pixels);
    }
  }
};

// Contiguous: a task is a group, walked twice as in the forward pass.
template <typename T>
struct ContiguousBackward {
  BackwardOperands<T> from;
  ChannelSums sums;  // zero
  Target grad_x;     // null where it is not wanted
  bool with_sum_of_n;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) T buffer[kRun], of_grad[kRun], of_g[kRun];
    Loader<T> loader(from, kRun);
    const int64_t depth = from.group_channels(), size = depth * from.pixels;
    const Runs runs(size, from.pixels);
    std::vector<T> factor(depth), offset(depth);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / from.groups, channel = task % from.groups * depth;
      const int64_t base = (b * from.channels + channel) * from.pixels;
      const T mean = from.mean[task], rstd = from.rstd[task];
      const ChannelSums of_sample = sums.from(b * from.channels);
      const ChannelSums of_group = of_sample.from(channel);
      for (int64_t c = 0; c < depth; ++c) {
        factor[c] = rstd * from.gain(b, channel + c);
        offset[c] = from.offset(b, channel + c);
      }
      T level = 0, slope = 0;
      for (const bool is_last : {false, true}) {
        if (is_last) {
          normalise_sums(rstd, depth, of_group);
          if (!grad_x.data) break;
          const GroupSums mean_of(from, b, task % from.groups, of_sample);
          level = static_cast<T>(rstd * mean_of.g);
          slope = static_cast<T>(rstd * mean_of.gn) * rstd;
        }
        for (int64_t step = 0; step < runs.count; ++step) {
          const auto [first, count] = runs.at(step, is_last);
          const int64_t piece = std::min(count, from.pixels), c = first / from.pixels;
          const T* h = load_run(from, loader, b, channel, first, count, buffer);
          T* g = grad_x.data ? room(grad_x, base + first, of_g) : of_g;
          const ChannelRun<T> run{h, g, piece, mean, factor.data() + c};
          if (!is_last || !keeps<T>(grad_x)) {
            const T* grad = read_upward(from.grad_y, base + first, count, of_grad);
            run_for(Processor::kSet,
                    ChannelUpstream<T>{run, grad, offset.data() + c, from.silu,
                                       is_last ? ChannelSums() : of_group.from(c), with_sum_of_n},
                    0, count / piece);
          }
          if (is_last) {
            run_for(Processor::kSet, ChannelDownstream<T>{run, slope, level}, 0, count / piece);
            flush(g, grad_x, base + first, count);
          }
        }
      }
    }
  }

  static FASTLDM_INLINE void normalise_sums(T rstd, int64_t depth, const ChannelSums& of_group) {
    for (int64_t c = 0; c < depth; ++c) {
      of_group.gn[c] *= rstd;
      of_group.n[c] *= rstd;
    }
  }
};

// The statistics and parameters of a sample, one number a channel.
template <typename T>
struct ChannelRows {
  std::vector<T> mean, factor, offset;

  explicit ChannelRows(int64_t channels) : mean(channels), factor(channels), offset(channels) {}

  FASTLDM_INLINE void fill(const BackwardOperands<T>& from, int64_t b) {
    for (int64_t c = 0; c < from.channels; ++c) {
      const int64_t group = b * from.groups + c / from.group_channels();
      mean[c] = from.mean[group];
      factor[c] = from.rstd[group] * from.gain(b, c);
      offset[c] = from.offset(b, c);
    }
  }
};

// A run of whole pixels at a time: its h and its g.
template <typename T>
class RowWalk {
 public:
  RowWalk(const BackwardOperands<T>& operands, const Target& grad_x)
      : rows(rows_of_run(operands.channels)),
        of_channel(operands.channels),
        from_(operands),
        grad_x_(grad_x),
        loader_(operands, rows * operands.channels),
        h_(operands.is_plain() ? 0 : rows * operands.channels),
        grad_(is_stored_as<T>(operands.grad_y.type) ? 0 : rows * operands.channels),
        g_(keeps<T>(grad_x) ? 0 : rows * operands.channels) {}

  // Whether this is the first call for the sample.
  FASTLDM_INLINE bool enter(int64_t b) {
    if (b == entered_) return false;
    of_channel.fill(from_, b);
    entered_ = b;
    return true;
  }

  // Computes g, or finds it in its place where it is kept from an earlier pass.
  template <typename Processor>
  FASTLDM_INLINE void make(int64_t b, int64_t first, int64_t count, bool is_kept) {
    const int64_t channels = from_.channels;
    base = (b * from_.pixels + first) * channels;
    h = load_rows(from_, loader_, b, first, count, h_.data());
    g = keeps<T>(grad_x_) ? room(grad_x_, base, g_.data()) : g_.data();
    if (is_kept) return;
    const T* grad = read_upward(from_.grad_y, base, count * channels, grad_.data());
    for (int64_t at = 0; at < count * channels; at += channels) {
      upstream<Processor, T, const T*>(h + at, grad + at, of_channel.mean.data(),
                                       of_channel.factor.data(), of_channel.offset.data(),
                                       from_.silu, limits_, channels, g + at);
    }
  }

  const int64_t rows;
  ChannelRows<T> of_channel;
  int64_t base = 0;  // where the run begins
  const T* h = nullptr;
  T* g = nullptr;

 private:
  const BackwardOperands<T>& from_;
  const Target grad_x_;
  Loader<T> loader_;
  std::vector<T> h_, grad_, g_;
  ExpLimits<T> limits_;
  int64_t entered_ = -1;
};

// Task: a block of pixels, summed channel by channel, with (h - mean) in place of n.
template <typename T>
struct ChannelsLastSums {
  BackwardOperands<T> from;
  Blocks blocks;
  Target grad_x;  // null where it is not wanted
  T* sums;        // [B, blocks, 3, C], zero
  bool with_sum_of_n;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t channels = from.channels;
    RowWalk<T> walk(from, grad_x);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks.per_sample, block = task % blocks.per_sample;
      const int64_t last = blocks.first(block) + blocks.count(block, from.pixels);
      T* to = sums + task * 3 * channels;
      walk.enter(b);
      const T* mean = walk.of_channel.mean.data();
      for (int64_t first = blocks.first(block), count; first < last; first += count) {
        count = std::min(walk.rows, last - first);
        walk.template make<Processor>(b, first, count, false);
        const FromCentres<T> distances{walk.h, mean};
        add_columns<Processor>(WeightedColumns<T>{walk.g, distances}, count, channels,
                               {to, to + channels});
        if (with_sum_of_n) {
          add_columns<Processor>(ColumnDistances<T>{distances}, count, channels,
                                 {to + 2 * channels});
        }
      }
    }
  }
};

// The sums of a sample, its blocks added in their order.
template <typename T>
void merge_blocks(const BackwardOperands<T>& from, const T* parts, int64_t blocks, int64_t b,
                  const ChannelSums& sums) {
  const int64_t channels = from.channels;
  parts += b * blocks * 3 * channels;
  for (int64_t block = 0; block < blocks; ++block, parts += 3 * channels) {
    for (int64_t c = 0; c < channels; ++c) {
      sums.g[c] += parts[c];
      sums.gn[c] += parts[channels + c];
      sums.n[c] += parts[2 * channels + c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const T rstd = from.rstd[b * from.groups + c / from.group_channels()];
    sums.gn[c] *= rstd;
    sums.n[c] *= rstd;
  }
}

// Task: a block of pixels, the last ones first: they are in the cache yet.
template <typename T>
struct ChannelsLastBackward {
  BackwardOperands<T> from;
  Blocks blocks;
  ChannelSums sums;
  Target grad_x;

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t channels = from.channels;
    RowWalk<T> walk(from, grad_x);
    std::vector<T> slope(channels), level(channels);
    for (int64_t task = end; task-- > begin;) {
      const int64_t b = task / blocks.per_sample, block = task % blocks.per_sample;
      const int64_t last = blocks.first(block) + blocks.count(block, from.pixels);
      if (walk.enter(b)) fill(b, slope.data(), level.data());
      for (int64_t first = blocks.first(block), count; first < last; first += count) {
        count = std::min(walk.rows, last - first);
        walk.template make<Processor>(b, first, count, keeps<T>(grad_x));
        for (int64_t at = 0; at < count * channels; at += channels) {
          downstream<Processor::kFused, T, const T*>(walk.h + at, walk.of_channel.mean.data(),
                                                     walk.of_channel.factor.data(), slope.data(),
                                                     level.data(), channels, walk.g + at);
        }
        flush(walk.g, grad_x, walk.base, count * channels);
      }
    }
  }

  FASTLDM_INLINE void fill(int64_t b, T* slope, T* level) const {
    const int64_t depth = from.group_channels();
    for (int64_t group = 0; group < from.groups; ++group) {
      const T rstd = from.rstd[b * from.groups + group];
      const GroupSums of_group(from, b, group, sums.from(b * from.channels));
      for (int64_t c = group * depth; c < (group + 1) * depth; ++c) {
        slope[c] = static_cast<T>(rstd * of_group.gn) * rstd;
        level[c] = static_cast<T>(rstd * of_group.g);
      }
    }
  }
};

}  // namespace fastldm::norm
