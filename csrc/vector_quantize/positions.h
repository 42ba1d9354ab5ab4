// Where the latents of a tensor are.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastldm {

// Calls visit(p, d) for every p below count and d below depth, in blocks: where one of them is far
// apart in memory, a block's cache lines are still there when the next of the other comes, also at
// the power-of-two strides of images, which put all channels into one set of the cache.
template <typename Visit>
void for_each_in_blocks(int64_t count, int64_t depth, Visit visit) {
  constexpr int64_t kLatents = 16, kChannels = 8;
  for (int64_t p_block = 0; p_block < count; p_block += kLatents) {
    const int64_t p_end = std::min(count, p_block + kLatents);
    for (int64_t d_block = 0; d_block < depth; d_block += kChannels) {
      const int64_t d_end = std::min(depth, d_block + kChannels);
      for (int64_t p = p_block; p < p_end; ++p)
        for (int64_t d = d_block; d < d_end; ++d) visit(p, d);
    }
  }
}

// Latent n, counted row by row over all dimensions but the channels', starts at offset(n), and its
// elements are channel_stride apart. Any strides will do, so channels_first, channels_last and
// sliced tensors are read and written in place.
class Positions {
 public:
  Positions(const at::Tensor& tensor, int64_t channel_dim)
      : channel_stride(tensor.stride(channel_dim)) {
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
      if (dim == channel_dim || size == 1) continue;
      if (!sizes_.empty() && strides_.back() == stride * size) {
        sizes_.back() *= size;
        strides_.back() = stride;
      } else {
        sizes_.push_back(size);
        strides_.push_back(stride);
      }
    }
    if (sizes_.empty()) {
      sizes_.push_back(1);
      strides_.push_back(0);
    }
  }

  int64_t offset(int64_t n) const {
    int64_t result = 0;
    for (size_t i = sizes_.size(); i-- > 0;) {
      result += n % sizes_[i] * strides_[i];
      n /= sizes_[i];
    }
    return result;
  }

  // offsets[i] = offset(first + i) for every i below count.
  void offsets(int64_t first, int64_t count, int64_t* offsets) const {
    for (int64_t i = 0; i < count;) {
      const int64_t run = std::min(count - i, sizes_.back() - (first + i) % sizes_.back());
      int64_t at = offset(first + i);
      for (const int64_t end = i + run; i < end; ++i, at += strides_.back()) offsets[i] = at;
    }
  }

  // Calls visit(p, d, where element d of latent first + p is) for every p below count and d below
  // depth.
  template <typename Visit>
  void for_each_element(int64_t first, int64_t count, int64_t depth, Visit visit) const {
    if (strides_.back() != 1) {
      std::vector<int64_t> place(count);
      offsets(first, count, place.data());
      for_each_in_blocks(count, depth,
                         [&](int64_t p, int64_t d) { visit(p, d, place[p] + d * channel_stride); });
      return;
    }
    for (int64_t p = 0; p < count;) {
      const int64_t run = std::min(count - p, sizes_.back() - (first + p) % sizes_.back());
      const int64_t place = offset(first + p);
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t i = 0; i < run; ++i) visit(p + i, d, place + d * channel_stride + i);
      p += run;
    }
  }

  const int64_t channel_stride;

 private:
  std::vector<int64_t> sizes_, strides_;
};

}  // namespace fastldm
