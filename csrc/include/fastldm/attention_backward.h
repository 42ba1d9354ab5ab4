// The gradients of attention for a few queries of one head; see simd.h for how it is included.
//
// With P the weights, dP = do · vᵀ and D = rowsum(P ∘ dP), a query's sum,
//     dS = scale · P ∘ (dP - D)     dq = dS · k     dk += dSᵀ · q     dv += Pᵀ · do.
// P and dS lie as the scores of attention.h do, all keys of a query at once. The products of the
// first line are those of that file; in dk and dv a panel is some channels of q and do instead, and
// its rows are the weights of one key, broadcast query by query.
#pragma once

#include "fastldm/attention.h"

namespace fastldm::FASTLDM_ISA {

// Adds to R rows of sums, some channels of them: of each query its weight times its channels.
template <bool kBoth>
struct SumTile {
  const float* weights;  // [panels, keys, kPanel], from this key on
  int64_t of_panel;      // from a panel's weights to those of the next
  const float* queries;  // [queries, channels], from this channel on
  int64_t channels, count;
  float* sums;  // [keys, channels]

  template <int R>
  FASTLDM_INLINE void run() const {
    Pair of_rows[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) of_rows[r] = {Floats{}, Floats{}};
    for (int64_t first = 0; first < count; first += kPanel) {
      const float* of_queries = weights + first / kPanel * of_panel;
      const int64_t last = count - first < kPanel ? count - first : kPanel;
      for (int64_t query = 0; query < last; ++query) {
        const Pair values = load_values(queries + (first + query) * channels);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Floats weight = broadcast(of_queries[r * kPanel + query]);
          of_rows[r].low = multiply_add(weight, values.low, of_rows[r].low);
          if constexpr (kBoth) {
            of_rows[r].high = multiply_add(weight, values.high, of_rows[r].high);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* to = sums + r * channels;
      store(to, load(to) + of_rows[r].low);
      if constexpr (kBoth) store(to + kFloats, load(to + kFloats) + of_rows[r].high);
    }
  }

  static FASTLDM_INLINE Pair load_values(const float* from) {
    if constexpr (kBoth) return load_pair(from);
    return {load(from), Floats{}};
  }
};

class AttentionGradients {
 public:
  // Queries of a call. The more they are, the more is added to sums that have been fetched; the
  // fewer, the closer their weights are kept.
  static int64_t queries(int64_t keys) { return kPanel * (keys <= 128 ? kPanels : kPanels / 2); }

  // Floats that a call needs.
  static int64_t scratch(int64_t keys, int64_t channels) {
    return 2 * queries(keys) * keys + 3 * kPanel * channels;
  }

  AttentionGradients(const PackedGradientHead& head, double scale, float* scratch)
      : head_(head),
        scale_(scale),
        weights_(scratch),
        slopes_(weights_ + queries(head.count) * head.count),
        queries_(slopes_ + queries(head.count) * head.count),
        upstream_(queries_ + kPanel * head.channels),
        gradients_(upstream_ + kPanel * head.channels) {}

  // queries and upstream: [count, padded]; the sums, [keys, padded], are added to. Null is a
  // gradient that is not wanted.
  void run(const float* queries, const float* upstream, int64_t count, float* grad_queries,
           int64_t stride, float* grad_keys, float* grad_values) const {
    for (int64_t first = 0; first < count; first += kPanel) {
      const int64_t rows = count - first < kPanel ? count - first : kPanel;
      find_weights(queries + first * head_.padded, upstream + first * head_.padded, rows,
                   weights_ + first * head_.count, slopes_ + first * head_.count);
      if (grad_queries) {
        find_query_gradients(slopes_ + first * head_.count, rows, grad_queries + first * stride,
                             stride);
      }
    }
    if (grad_values) add_sums(weights_, upstream, count, grad_values);
    if (grad_keys) add_sums(slopes_, queries, count, grad_keys);
  }

 private:
  // P and dS of a panel.
  FASTLDM_INLINE void find_weights(const float* queries, const float* upstream, int64_t rows,
                                   float* weights, float* slopes) const {
    const Parts blocks = head_.blocks();
    to_panel({queries, head_.padded}, rows, head_.channels, Exponent::sign(scale_), queries_);
    to_panel({upstream, head_.padded}, rows, head_.channels, 1.0f, upstream_);
    Pair largest = {broadcast(kLowest), broadcast(kLowest)}, largest_product = largest;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t first = blocks.first(block), channels = head_.channels;
      const Parts tiles(blocks.size(block), kRows);
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t key = first + tiles.first(tile), size = tiles.size(tile);
        multiply_keys(head_.keys + key * channels, size, queries_, channels, weights + key * kPanel,
                      largest);
        multiply_keys(head_.values + key * channels, size, upstream_, channels,
                      slopes + key * kPanel, largest_product);
      }
    }
    const Exponent exponent(scale_);
    Pair sum = {Floats{}, Floats{}}, delta = sum;
    for (int64_t block = 0; block < blocks.count; ++block) {
      Pair of_block = {Floats{}, Floats{}}, delta_of_block = of_block;
      for (int64_t key = blocks.first(block); key < blocks.first(block + 1); ++key) {
        const Pair weight = exponent.weight(load_pair(weights + key * kPanel), largest);
        store_pair(weights + key * kPanel, weight);
        of_block = of_block + weight;
        delta_of_block = multiply_add(weight, load_pair(slopes + key * kPanel), delta_of_block);
      }
      sum = sum + of_block;
      delta = delta + delta_of_block;
    }
    const Floats one = broadcast(1.0f), scale = broadcast(static_cast<float>(scale_));
    const Pair inverse = {one / sum.low, one / sum.high};
    delta = delta * inverse;
    for (int64_t key = 0; key < head_.count; ++key) {
      const Pair weight = load_pair(weights + key * kPanel) * inverse;
      const Pair product = load_pair(slopes + key * kPanel);
      store_pair(weights + key * kPanel, weight);
      store_pair(slopes + key * kPanel, {weight.low * (product.low - delta.low) * scale,
                                         weight.high * (product.high - delta.high) * scale});
    }
  }

  FASTLDM_INLINE void find_query_gradients(const float* slopes, int64_t rows, float* to,
                                           int64_t stride) const {
    const Parts blocks = head_.blocks(), tiles(head_.channels, kRows);
    const Pair ones = {broadcast(1.0f), broadcast(1.0f)};
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t first = blocks.first(block), keys = blocks.size(block);
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t channel = tiles.first(tile);
        with_rows(tiles.size(tile),
                  ValueTile{head_.keys_by_channel + first * head_.channels + channel * keys,
                            slopes + first * kPanel, keys, block == 0, ones,
                            gradients_ + channel * kPanel});
      }
    }
    transpose(gradients_, kPanel, head_.channels, rows, 1.0f, to, stride);
  }

  // For every key the sum over the queries of its weight times their channels.
  FASTLDM_INLINE void add_sums(const float* weights, const float* queries, int64_t count,
                               float* sums) const {
    const int64_t padded = head_.padded, of_panel = head_.count * kPanel;
    const Parts tiles(head_.count, kRows);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t key = tiles.first(tile), keys = tiles.size(tile);
      int64_t channel = 0;
      for (; channel + kPanel <= padded; channel += kPanel) {
        with_rows(keys, SumTile<true>{weights + key * kPanel, of_panel, queries + channel, padded,
                                      count, sums + key * padded + channel});
      }
      if (channel < padded) {
        with_rows(keys, SumTile<false>{weights + key * kPanel, of_panel, queries + channel, padded,
                                       count, sums + key * padded + channel});
      }
    }
  }

  const PackedGradientHead head_;
  const double scale_;
  // P and dS, [panels, keys, kPanel], and of one panel q, do and dq, [channels, kPanel].
  float *const weights_, *const slopes_, *const queries_, *const upstream_, *const gradients_;
};

}  // namespace fastldm::FASTLDM_ISA
