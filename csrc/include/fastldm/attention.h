// softmax(scale · q · kᵀ) · v of one head for a few queries; see simd.h for how it is included.
//
// A register holds one number of each of several queries: scores lie as [keys, kPanel], queries and
// outputs as [channels, kPanel]. So the softmax needs no exchange between lanes, no query's result
// depends on its neighbours, and both products are rows of packed numbers, broadcast one by one,
// times a panel. Where the keys are more than a block, sums and outputs are scaled to the largest
// score so far before the next block is added (Milakov and Gimelshein, arXiv 1805.02867).
#pragma once

#include "fastldm/attention_view.h"
#include "fastldm/exp2.h"
#include "fastldm/panel.h"
#include "fastldm/transpose.h"

namespace fastldm::FASTLDM_ISA {

// Panels of a call: a block of keys is read from a farther cache once for all of them.
constexpr int kPanels = 8;

constexpr float kLowest = -3.40282347e38f;

// What makes weights of products: the scale comes after the largest product is subtracted, when
// rounding costs the least. Its sign is the queries', so that the largest product is the largest
// score.
struct Exponent {
  Floats factor;

  explicit FASTLDM_INLINE Exponent(double scale)
      : factor(broadcast(static_cast<float>((scale < 0 ? -scale : scale) * 1.4426950408889634))) {}

  static FASTLDM_INLINE float sign(double scale) { return scale < 0 ? -1.0f : 1.0f; }

  FASTLDM_INLINE Pair weight(Pair product, Pair largest) const {
    return {exp2_of_negative((product.low - largest.low) * factor),
            exp2_of_negative((product.high - largest.high) * factor)};
  }
};

// factor · rows, at most kPanel, as [channels, kPanel]; 0 in the lanes that are left.
FASTLDM_INLINE void to_panel(Rows from, int64_t rows, int64_t channels, float factor, float* to) {
  if (rows < kPanel) {
    for (int64_t c = 0; c < channels; ++c) store_pair(to + c * kPanel, {Floats{}, Floats{}});
  }
  transpose(from.data, from.stride, rows, channels, factor, to, kPanel);
}

// Channels whose products are added one after another; longer sums are sums of such, which round
// less.
constexpr int64_t kChain = 80;

// Products of some channels of a tile of keys with those of a panel of queries, and the largest
// sum.
struct ProductTile {
  const float *keys, *queries;
  int64_t channels;
  bool is_first, is_last;
  float* products;
  Pair& largest;

  template <int R>
  FASTLDM_INLINE void run() const {
    Pair sums[R];
    multiply<R>(keys, queries, channels, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* to = products + r * kPanel;
      if (!is_first) sums[r] = load_pair(to) + sums[r];
      if (is_last) largest = larger(largest, sums[r]);
      store_pair(to, sums[r]);
    }
  }
};

// Products of `size` keys with a panel, [channels, kPanel], and the largest so far.
FASTLDM_INLINE void multiply_keys(const float* keys, int64_t size, const float* queries,
                                  int64_t channels, float* products, Pair& largest) {
  const Parts parts(channels, kChain);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t channel = parts.first(part);
    with_rows(size, ProductTile{keys + channel * size, queries + channel * kPanel, parts.size(part),
                                part == 0, part == parts.count - 1, products, largest});
  }
}

// Adds a block's weighted values, some channels of them, to decay · outputs.
struct ValueTile {
  const float *values, *weights;
  int64_t keys;
  bool is_first;
  Pair decay;
  float* outputs;

  template <int R>
  FASTLDM_INLINE void run() const {
    Pair sums[R];
    multiply<R>(values, weights, keys, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* to = outputs + r * kPanel;
      if (!is_first) sums[r] = multiply_add(load_pair(to), decay, sums[r]);
      store_pair(to, sums[r]);
    }
  }
};

class Attention {
 public:
  static constexpr int64_t kQueries = kPanels * kPanel;

  // Floats that a call needs.
  static int64_t scratch(int64_t channels) {
    return kPanel * (kKeyBlock + kPanels * (2 * channels + 2));
  }

  Attention(const PackedHead& head, double scale, float* scratch)
      : head_(head),
        exponent_(scale),
        sign_(Exponent::sign(scale)),
        products_(scratch),
        queries_(products_ + kPanel * kKeyBlock),
        outputs_(queries_ + kPanels * kPanel * head.channels),
        largest_(outputs_ + kPanels * kPanel * head.channels),
        sums_(largest_ + kPanels * kPanel) {}

  // Up to kQueries queries, [count, channels].
  void run(Rows queries, int64_t count, float* outputs, int64_t output_stride) const {
    const Parts blocks = head_.blocks();
    const int64_t panels = (count + kPanel - 1) / kPanel;
    for (int64_t block = 0; block < blocks.count; ++block) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = panel * kPanel,
                      rows = count - first < kPanel ? count - first : kPanel;
        const float* from = queries.data + first * queries.stride;
        float* to = outputs + first * output_stride;
        if (block == 0) {
          // The next panel's come while this one is computed.
          prefetch_rows(from + kPanel * queries.stride, queries.stride);
          prefetch_rows(to + kPanel * output_stride, output_stride);
          begin(panel, {from, queries.stride}, rows);
        }
        add(panel, blocks, block);
        if (block == blocks.count - 1) finish(panel, rows, to, output_stride);
      }
    }
  }

 private:
  FASTLDM_INLINE void prefetch_rows(const float* rows, int64_t stride) const {
    for (int64_t i = 0; i < kPanel; ++i) {
      for (int64_t c = 0; c < head_.channels; c += 16) __builtin_prefetch(rows + i * stride + c);
    }
  }

  FASTLDM_INLINE void begin(int64_t panel, Rows queries, int64_t rows) const {
    to_panel(queries, rows, head_.channels, sign_, queries_ + panel * kPanel * head_.channels);
    store_pair(largest_ + panel * kPanel, {broadcast(kLowest), broadcast(kLowest)});
  }

  FASTLDM_INLINE void add(int64_t panel, const Parts& blocks, int64_t block) const {
    const int64_t channels = head_.channels, first = blocks.first(block), keys = blocks.size(block);
    const Pair before = load_pair(largest_ + panel * kPanel);
    Pair largest = before;
    const Parts key_tiles(keys, kRows);
    for (int64_t tile = 0; tile < key_tiles.count; ++tile) {
      const int64_t key = key_tiles.first(tile);
      multiply_keys(head_.keys + (first + key) * channels, key_tiles.size(tile),
                    queries_ + panel * kPanel * channels, channels, products_ + key * kPanel,
                    largest);
    }
    store_pair(largest_ + panel * kPanel, largest);
    Pair sum = {Floats{}, Floats{}};
    for (int64_t key = 0; key < keys; ++key) {
      float* of_key = products_ + key * kPanel;
      const Pair weight = exponent_.weight(load_pair(of_key), largest);
      store_pair(of_key, weight);
      sum = sum + weight;
    }
    const Pair decay = exponent_.weight(before, largest);
    float* of_panel = sums_ + panel * kPanel;
    if (block > 0) sum = multiply_add(load_pair(of_panel), decay, sum);
    store_pair(of_panel, sum);
    const Parts value_tiles(channels, kRows);
    for (int64_t tile = 0; tile < value_tiles.count; ++tile) {
      const int64_t channel = value_tiles.first(tile);
      with_rows(value_tiles.size(tile),
                ValueTile{head_.values + first * channels + channel * keys, products_, keys,
                          block == 0, decay, outputs_ + (panel * channels + channel) * kPanel});
    }
  }

  FASTLDM_INLINE void finish(int64_t panel, int64_t rows, float* to, int64_t stride) const {
    const Pair sum = load_pair(sums_ + panel * kPanel);
    const Pair inverse = {broadcast(1.0f) / sum.low, broadcast(1.0f) / sum.high};
    float* of_panel = outputs_ + panel * kPanel * head_.channels;
    for (int64_t c = 0; c < head_.channels; ++c) {
      store_pair(of_panel + c * kPanel, load_pair(of_panel + c * kPanel) * inverse);
    }
    transpose(of_panel, kPanel, head_.channels, rows, 1.0f, to, stride);
  }

  const PackedHead head_;
  const Exponent exponent_;
  const float sign_;
  // Products with a block of keys, which become its weights, [keys, kPanel]; of every panel queries
  // and outputs, [channels, kPanel], and the rest, [kPanel].
  float *const products_, *const queries_, *const outputs_, *const largest_, *const sums_;
};

struct KeyTile {
  Rows keys;
  int64_t channels;
  float* to;

  template <int R>
  FASTLDM_INLINE void run() const {
    transpose_few<R>(keys.data, keys.stride, channels, to);
  }
};

struct ChannelTile {
  Rows keys;
  int64_t count;
  float* to;

  template <int R>
  FASTLDM_INLINE void run() const {
    for (int64_t key = 0; key < count; ++key) {
      __builtin_memcpy(to + key * R, keys.data + key * keys.stride, R * sizeof(float));
    }
  }
};

// Keys in blocks of tiles, [channels, keys of the tile].
inline void pack_by_key(Rows keys, int64_t count, int64_t channels, float* to) {
  const Parts blocks = key_blocks(count);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const Parts tiles(blocks.size(block), kRows);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t key = blocks.first(block) + tiles.first(tile);
      with_rows(
          tiles.size(tile),
          KeyTile{{keys.data + key * keys.stride, keys.stride}, channels, to + key * channels});
    }
  }
}

// The same in tiles of channels, [keys of the block, channels of the tile].
inline void pack_by_channel(Rows keys, int64_t count, int64_t channels, float* to) {
  const Parts blocks = key_blocks(count), tiles(channels, kRows);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = blocks.first(block), size = blocks.size(block);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t channel = tiles.first(tile);
      with_rows(tiles.size(tile),
                ChannelTile{{keys.data + first * keys.stride + channel, keys.stride},
                            size,
                            to + first * channels + channel * size});
    }
  }
}

}  // namespace fastldm::FASTLDM_ISA
