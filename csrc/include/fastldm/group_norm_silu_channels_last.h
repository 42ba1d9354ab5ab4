// GroupNorm + SiLU with channels innermost, on one processor core; names as in group_norm_silu.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "fastldm/column_sums.h"
#include "fastldm/group_norm_silu.h"

namespace fastldm::norm {

// With channels innermost a sample is cut into blocks of pixels, whatever the number of threads.
struct Blocks {
  int64_t pixels_each, per_sample;

  Blocks(int64_t channels, int64_t pixels) {
    // Large enough for a channel's own mean to be worth it, small enough for the cache.
    pixels_each = std::clamp<int64_t>((1 << 16) / channels, 32, 256);
    per_sample = (pixels + pixels_each - 1) / pixels_each;
  }

  FASTLDM_INLINE int64_t first(int64_t block) const { return block * pixels_each; }
  FASTLDM_INLINE int64_t count(int64_t block, int64_t pixels) const {
    return std::min(pixels_each, pixels - block * pixels_each);
  }
};

// How many rows of pixels make a run: a multiple of the four that are added up together.
FASTLDM_INLINE int64_t rows_of_run(int64_t channels) {
  return std::max<int64_t>(4, kRun / channels / 4 * 4);
}

// [count, C] elements of h from pixel `first` on.
template <typename T>
FASTLDM_INLINE const T* load_rows(const Operands<T>& from, Loader<T>& loader, int64_t b,
                                  int64_t first, int64_t count, T* buffer) {
  const int64_t channels = from.channels, base = (b * from.pixels + first) * channels;
  const T* added = from.channel_add ? from.channel_add + b * channels : loader.nothing();
  const int64_t rows = from.is_sum() ? 1 : count;
  const T* h = nullptr;
  for (int64_t row = 0; row < count; row += rows) {
    const int64_t at = row * channels;
    const T* of_rows = loader.load(base + at, rows * channels, added, buffer + at);
    if (row == 0) h = of_rows;
  }
  return h;
}

// Task: a block of pixels, whose moments are taken channel by channel and merged into groups.
template <typename T>
struct ChannelsLastMoments {
  Operands<T> from;
  Blocks blocks;
  Moments* moments;  // [B, blocks, groups]

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t channels = from.channels, depth = from.group_channels();
    Loader<T> loader(from, rows_of_run(channels) * channels);
    std::vector<T> buffer(from.is_plain() ? 0 : blocks.pixels_each * channels);
    std::vector<T> centre(channels), sums(channels), squares(channels);
    std::vector<double> means(channels), spreads(channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks.per_sample, block = task % blocks.per_sample;
      const int64_t count = blocks.count(block, from.pixels);
      const T* h = load_rows(from, loader, b, blocks.first(block), count, buffer.data());
      std::fill(sums.begin(), sums.end(), T(0));
      std::fill(squares.begin(), squares.end(), T(0));
      const int64_t sample = (count + 3) / 4;
      add_columns<Processor>(ColumnValues<T>{h}, sample, channels, {sums.data()});
      for (int64_t c = 0; c < channels; ++c) {
        centre[c] = sums[c] / static_cast<T>(sample);
        sums[c] = 0;
      }
      add_columns<Processor>(ColumnDeviations<T>{{h, centre.data()}}, count, channels,
                             {sums.data(), squares.data()});
      for (int64_t c = 0; c < channels; ++c) {
        const T shift = sums[c] / static_cast<T>(count), spread = squares[c] - sums[c] * shift;
        means[c] = static_cast<double>(centre[c]) + shift;
        spreads[c] = spread < T(0) ? T(0) : spread;
      }
      for (int64_t g = 0; g < from.groups; ++g) {
        moments[task * from.groups + g] =
            of_group<Processor>(means.data() + g * depth, spreads.data() + g * depth, depth,
                                static_cast<double>(count));
      }
    }
  }

  // Of channels of `count` elements each.
  template <typename Processor>
  static FASTLDM_INLINE Moments of_group(const double* means, const double* spreads, int64_t depth,
                                         double count) {
    const double mean = sum<Processor>(means, depth) / static_cast<double>(depth);
    double distance = 0, between = 0;
    sum_deviations<Processor>(means, depth, mean, distance, between);
    return {count * static_cast<double>(depth), mean,
            sum<Processor>(spreads, depth) + count * between};
  }
};

// Task: a block of pixels. Each thread merges the moments of the samples that it meets. It begins
// with the blocks whose moments it took last, which are in its cache yet.
template <typename T>
struct ChannelsLastForward {
  Operands<T> from;
  Blocks blocks;
  const Moments* moments;
  Target y;
  T *mean, *rstd;  // written by the task of a sample's first block, or null

  template <typename Processor>
  FASTLDM_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t channels = from.channels, rows = rows_of_run(channels);
    Loader<T> loader(from, rows * channels);
    std::vector<T> buffer(from.is_plain() ? 0 : rows * channels);
    std::vector<T> rounded(is_stored_as<T>(y.type) ? 0 : rows * channels);
    std::vector<T> centre(channels), factor(channels), offset(channels);
    const ExpLimits<T> limits;
    int64_t prepared = -1;
    for (int64_t task = end; task-- > begin;) {
      const int64_t b = task / blocks.per_sample, block = task % blocks.per_sample;
      const bool has_first = b * blocks.per_sample >= begin;
      if (b != prepared) prepare(b, has_first, centre.data(), factor.data(), offset.data());
      prepared = b;
      const int64_t last = blocks.first(block) + blocks.count(block, from.pixels);
      for (int64_t first = blocks.first(block), count; first < last; first += count) {
        count = std::min(rows, last - first);
        const int64_t base = (b * from.pixels + first) * channels;
        const T* h = load_rows(from, loader, b, first, count, buffer.data());
        T* to = room(y, base, rounded.data());
        for (int64_t at = 0; at < count * channels; at += channels) {
          const T *centres = centre.data(), *factors = factor.data(), *offsets = offset.data();
          if (from.silu) {
            activate<Processor>(h + at, centres, factors, offsets, limits, channels, to + at);
          } else {
            normalise<Processor::kFused>(h + at, centres, factors, offsets, 0, channels, to + at);
          }
        }
        flush(to, y, base, count * channels);
      }
    }
  }

  FASTLDM_INLINE void prepare(int64_t b, bool has_first, T* centre, T* factor, T* offset) const {
    const int64_t depth = from.group_channels();
    for (int64_t g = 0; g < from.groups; ++g) {
      Moments all;
      for (int64_t block = 0; block < blocks.per_sample; ++block) {
        all.add(moments[(b * blocks.per_sample + block) * from.groups + g]);
      }
      const double inverse = 1 / std::sqrt(all.squares / all.count + from.eps);
      if (has_first && mean) {
        mean[b * from.groups + g] = static_cast<T>(all.mean);
        rstd[b * from.groups + g] = static_cast<T>(inverse);
      }
      for (int64_t c = g * depth; c < (g + 1) * depth; ++c) {
        const Affine<T> with(all.mean, inverse, from.gain(b, c), from.offset(b, c));
        centre[c] = with.centre;
        factor[c] = with.factor;
        offset[c] = with.offset;
      }
    }
  }
};

}  // namespace fastldm::norm
