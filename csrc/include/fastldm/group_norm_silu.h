// GroupNorm + SiLU on one processor core, as fastldm/ops/group_norm_silu/reference.py defines it.
//
// With h = x + channel_add + residual, m = the mean of its group rounded to T, and for each channel
//     gain = weight (1 + scale), offset = bias (1 + scale) + shift, rstd = 1/sqrt(var + eps)
// an element becomes y = silu((h - m) (rstd gain) + (offset + (m - mean) (rstd gain))): the last
// term gives back what rounding the mean took away, so a mean far above the deviation costs
// nothing.
//
// Deviations are summed about a centre that is known before the elements are read once, and merged
// in a fixed order. In the contiguous layout it is the mean m of what came before: a run of n
// elements whose mean is s away loses at most about n s^2 ulp to cancellation, and no less than
// n s^2/2 is added to the squares for that distance. For the first run, and with channels innermost
// for a channel of a block, it is the mean of the first quarter, which is at most twice the
// deviation away from the mean of all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "fastldm/arithmetic.h"
#include "fastldm/prefetch.h"
#include "fastldm/silu.h"
#include "fastldm/storage.h"
#include "fastldm/sums.h"
#include "fastldm/versioned_task.h"

namespace fastldm::norm {

// Elements of a run in the contiguous layout: it stays in the nearest cache while it is read twice.
constexpr int64_t kRun = 4096;

// T is the type of the computation. Tensors are dense: [B, C, pixels] or, with channels innermost,
// [B, pixels, C]. Null is an option that is not given.
template <typename T>
struct Operands {
  Source x, residual;
  const T* weight = nullptr;       // [C]
  const T* bias = nullptr;         // [C]
  const T* channel_add = nullptr;  // [B, C], as the next two
  const T* scale = nullptr;
  const T* shift = nullptr;
  int64_t batch = 0, channels = 0, pixels = 0, groups = 0;
  double eps = 0;
  bool silu = true;

  FASTLDM_INLINE int64_t group_channels() const { return channels / groups; }

  FASTLDM_INLINE T gain(int64_t b, int64_t c) const {
    const T gain = weight ? weight[c] : T(1);
    return scale ? gain * (T(1) + scale[b * channels + c]) : gain;
  }

  FASTLDM_INLINE T offset(int64_t b, int64_t c) const {
    T offset = bias ? bias[c] : T(0);
    if (scale) offset *= T(1) + scale[b * channels + c];
    return shift ? offset + shift[b * channels + c] : offset;
  }

  // Whether h is more than x.
  FASTLDM_INLINE bool is_sum() const { return channel_add || residual.data; }
  // Whether h is in memory as it is computed with.
  FASTLDM_INLINE bool is_plain() const { return is_stored_as<T>(x.type) && !is_sum(); }
};

// One number for every element of a run, where its channels-innermost counterpart is a pointer.
template <typename T>
struct Same {
  T value;
  FASTLDM_INLINE T operator[](int64_t) const { return value; }
};

// h, run by run.
template <typename T>
class Loader {
 public:
  Loader(const Operands<T>& operands, int64_t longest)
      : from_(operands),
        nothing_(operands.is_sum() ? operands.channels : 0),
        x_(operands.is_sum() && !is_stored_as<T>(operands.x.type) ? longest : 0),
        residual_(operands.residual.data ? x_.size() : 0) {}

  // A channel_add of zeros.
  FASTLDM_INLINE const T* nothing() const { return nothing_.data(); }

  // h = x + added + residual of `count` elements from `first` on: in place, or in `to`.
  template <typename Added>
  FASTLDM_INLINE const T* load(int64_t first, int64_t count, Added added, T* to) {
    if (!from_.is_sum()) return read_upward(from_.x, first, count, to);
    const T* __restrict__ x = read_upward(from_.x, first, count, x_.data());
    T* __restrict__ h = to;
    if (from_.residual.data) {
      const T* __restrict__ residual = read_upward(from_.residual, first, count, residual_.data());
      for (int64_t i = 0; i < count; ++i) h[i] = x[i] + added[i] + residual[i];
    } else {
      for (int64_t i = 0; i < count; ++i) h[i] = x[i] + added[i];
    }
    return to;
  }

 private:
  const Operands<T>& from_;
  std::vector<T> nothing_, x_, residual_;
};

// p of `count` elements from `first` on.
template <bool kFused, typename T, typename Values>
FASTLDM_INLINE void normalise(const T* __restrict__ h, Values centre, Values factor, Values offset,
                              int64_t first, int64_t count, T* __restrict__ p) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = first + i;
    p[i] = multiply_add<kFused>(h[at] - centre[at], factor[at], offset[at]);
  }
}

// y of the block that begins at `first`.
template <typename Processor, typename T, typename Values>
FASTLDM_INLINE void activate_block(const T* __restrict__ h, Values centre, Values factor,
                                   Values offset, const ExpLimits<T>& limits, int64_t first,
                                   T* __restrict__ y) {
  constexpr int kCount = kBlock<Processor, T>;
  T p[kCount];
  normalise<Processor::kFused>(h, centre, factor, offset, first, kCount, p);
  silu<Processor::kFused, kCount>(p, limits, y + first);
}

// y of `count` elements. Meanwhile those of `ahead` come into the cache.
template <typename Processor, typename T, typename Values>
FASTLDM_INLINE void activate(const T* __restrict__ h, Values centre, Values factor, Values offset,
                             const ExpLimits<T>& limits, int64_t count, T* __restrict__ y,
                             const Ahead& ahead = {}) {
  constexpr int kCount = kBlock<Processor, T>;
  int64_t done = 0;
  for (; done + kCount <= count; done += kCount) {
    // Where a block is one number it would keep the loop from becoming vector code.
    if constexpr (kCount > 1) ahead.request(done, kCount);
    activate_block<Processor>(h, centre, factor, offset, limits, done, y);
  }
  normalise<Processor::kFused>(h, centre, factor, offset, done, count - done, y + done);
  silu<Processor>(y + done, count - done, limits);
}

// The runs in which a contiguous group is walked, in its elements: whole channels, as many as fit,
// or pieces of one channel.
struct Runs {
  int64_t count;

  FASTLDM_INLINE Runs(int64_t group_size, int64_t pixels)
      : whole_(pixels <= kRun ? group_size : pixels),
        each_(pixels <= kRun ? kRun / pixels * pixels : kRun),
        pieces_((whole_ + each_ - 1) / each_) {
    count = group_size / whole_ * pieces_;
  }

  struct Run {
    int64_t first, count;
  };

  // In their order, or the last one first.
  FASTLDM_INLINE Run at(int64_t step, bool backwards) const {
    const int64_t run = backwards ? count - 1 - step : step, piece = run % pieces_ * each_;
    return {run / pieces_ * whole_ + piece, std::min(each_, whole_ - piece)};
  }

 private:
  // No run goes beyond a whole, which has so many pieces.
  int64_t whole_, each_, pieces_;
};

// `count` elements of the group whose first channel is `channel`, from its element `first` on.
template <typename T>
FASTLDM_INLINE const T* load_run(const Operands<T>& from, Loader<T>& loader, int64_t b,
                                 int64_t channel, int64_t first, int64_t count, T* buffer) {
  const int64_t base = (b * from.channels + channel) * from.pixels + first;
  const int64_t piece = from.channel_add ? std::min(count, from.pixels) : count;
  int64_t c = b * from.channels + channel + first / from.pixels;
  const T* h = nullptr;
  for (int64_t i = 0; i < count; i += piece, ++c) {
    const Same<T> added{from.channel_add ? from.channel_add[c] : T(0)};
    const T* of_piece = loader.load(base + i, piece, added, buffer + i);
    if (i == 0) h = of_piece;
  }
  return h;
}

template <typename Processor, typename T>
FASTLDM_INLINE Moments moments_about(T centre, const T* h, int64_t count) {
  T about = 0, squares = 0;
  sum_deviations<Processor>(h, count, centre, about, squares);
  return Moments::about(centre, static_cast<double>(count), about, squares);
}

// What a channel's elements are normalised with.
template <typename T>
struct Affine {
  T centre, factor, offset;

  FASTLDM_INLINE Affine(double mean, double rstd, T gain, T channel_offset) {
    const double slope = rstd * gain;
    centre = static_cast<T>(mean);
    factor = static_cast<T>(slope);
    offset = static_cast<T>(channel_offset + (centre - mean) * slope);
  }
};

// Task: a channel of a contiguous run. A function of its own, which keeps the constants of silu in
// registers from channel to channel.
template <typename T>
struct ChannelNormalisation {
  const T* h;
  T* y;
  int64_t pixels;
  T centre;
  const T *factor, *offset;  // [channels]
  bool silu;
  Ahead ahead;  // as far as this run

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const ExpLimits<T> limits;
    constexpr int kCount = kBlock<Processor, T>;
    if (silu && kCount > 1 && pixels % kCount == 0) {
      return activate_blocks<Processor>(begin, end, limits);
    }
    // Channels that fill no block are activated together.
    const bool is_short = pixels < kCount;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * pixels;
      const Same<T> same_centre{centre}, same_factor{factor[c]}, same_offset{offset[c]};
      if (silu && !is_short) {
        activate<Processor>(h + first, same_centre, same_factor, same_offset, limits, pixels,
                            y + first, ahead.from(first));
      } else {
        normalise<Processor::kFused>(h + first, same_centre, same_factor, same_offset, 0, pixels,
                                     y + first);
      }
    }
    if (silu && is_short) {
      fastldm::silu<Processor>(y + begin * pixels, (end - begin) * pixels, limits);
    }
  }

  // Channels of whole blocks. Without remainders the loops are one, to which the constants of silu
  // are loaded once, and not for each channel.
  template <typename Processor>
  FASTLDM_INLINE void activate_blocks(int64_t begin, int64_t end,
                                      const ExpLimits<T>& limits) const {
    constexpr int kCount = kBlock<Processor, T>;
    const int64_t blocks = pixels / kCount;
    const T* from = h + begin * pixels;
    T* to = y + begin * pixels;
    Ahead next = ahead.from(begin * pixels);
    for (int64_t c = begin; c < end; ++c) {
      const Same<T> same_centre{centre}, same_factor{factor[c]}, same_offset{offset[c]};
      for (int64_t block = 0; block < blocks; ++block, from += kCount, to += kCount) {
        next.request(0, kCount);
        next = next.from(kCount);
        activate_block<Processor>(from, same_centre, same_factor, same_offset, limits, 0, to);
      }
    }
  }
};

// Contiguous: a task is a group, read twice and written once. The second time the last runs come
// first: they are in the cache yet. While a group is normalised, which is mostly computation, the
// next one comes into the cache.
template <typename T>
struct ContiguousForward {
  Operands<T> from;
  Target y;
  T *mean, *rstd;  // [B, groups], or null

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    alignas(64) T buffer[kRun], rounded[kRun];
    Loader<T> loader(from, kRun);
    const int64_t depth = from.group_channels(), size = depth * from.pixels;
    const Runs runs(size, from.pixels);
    std::vector<T> factor(depth), offset(depth);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / from.groups, channel = task % from.groups * depth;
      const int64_t base = (b * from.channels + channel) * from.pixels;
      Moments all;
      for (const bool is_last : {false, true}) {
        if (is_last) prepare(all, task, factor.data(), offset.data());
        for (int64_t step = 0; step < runs.count; ++step) {
          const auto [first, count] = runs.at(step, is_last);
          const T* h = load_run(from, loader, b, channel, first, count, buffer);
          if (!is_last) {
            const int64_t sample = (count + 3) / 4;
            const T centre = first == 0 ? sum<Processor>(h, sample) / static_cast<T>(sample)
                                        : static_cast<T>(all.mean);
            all.add(moments_about<Processor>(centre, h, count));
            continue;
          }
          T* to = room(y, base + first, rounded);
          const int64_t piece = std::min(count, from.pixels);
          const int64_t c = first / from.pixels;
          const Ahead next = task + 1 < end ? Ahead(from.x, base + size + first) : Ahead();
          const ChannelNormalisation<T> of_channel{
              h,         to,  piece, static_cast<T>(all.mean), factor.data() + c, offset.data() + c,
              from.silu, next};
          run_for(Processor::kSet, of_channel, 0, count / piece);
          flush(to, y, base + first, count);
        }
      }
    }
  }

  // [channels of the group] each.
  FASTLDM_INLINE void prepare(const Moments& all, int64_t task, T* factor, T* offset) const {
    const int64_t b = task / from.groups, depth = from.group_channels();
    const int64_t channel = task % from.groups * depth;
    const double inverse = 1 / std::sqrt(all.squares / all.count + from.eps);
    for (int64_t c = 0; c < depth; ++c) {
      const Affine<T> with(all.mean, inverse, from.gain(b, channel + c),
                           from.offset(b, channel + c));
      factor[c] = with.factor;
      offset[c] = with.offset;
    }
    if (!mean) return;
    mean[task] = static_cast<T>(all.mean);
    rstd[task] = static_cast<T>(inverse);
  }
};

}  // namespace fastldm::norm
