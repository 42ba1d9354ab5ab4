// Tensors [B, L, H, D] as the attention kernels take them: one head's rows of float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "fastldm/attention_view.h"
#include "fastldm/prefetch.h"
#include "tensor_memory.h"

namespace fastldm {

inline std::unique_ptr<float[]> uninitialised(int64_t count) {
  return std::make_unique_for_overwrite<float[]>(count);
}

// The rows of one head after another's, of any strides.
class Heads {
 public:
  explicit Heads(const at::Tensor& tensor)
      : source_(source(tensor)),
        channels_(tensor.size(3)),
        of_sample_(tensor.stride(0)),
        of_position_(tensor.stride(1)),
        of_head_(tensor.stride(2)),
        of_channel_(tensor.stride(3)) {}

  // Whether rows are float32 without gaps.
  bool is_in_place() const { return source_.type == Storage::kFloat && of_channel_ == 1; }

  Rows in_place(int64_t b, int64_t h, int64_t first) const {
    return {static_cast<const float*>(source_.data) + offset(b, h, first), of_position_};
  }

  void copy(int64_t b, int64_t h, int64_t position, float* to) const {
    // One head's rows lie apart, which no processor foresees.
    prefetch(source_.data, source_.type, offset(b, h, position + kAhead), channels_);
    switch (source_.type) {
      case Storage::kHalf:
        return copy_as<Half>(offset(b, h, position), to);
      case Storage::kBFloat16:
        return copy_as<BFloat16>(offset(b, h, position), to);
      default:
        return copy_as<float>(offset(b, h, position), to);
    }
  }

 private:
  static constexpr int64_t kAhead = 12;

  int64_t offset(int64_t b, int64_t h, int64_t position) const {
    return b * of_sample_ + h * of_head_ + position * of_position_;
  }

  template <typename S>
  void copy_as(int64_t from, float* to) const {
    const S* data = static_cast<const S*>(source_.data) + from;
    if (of_channel_ == 1) {
      for (int64_t c = 0; c < channels_; ++c) to[c] = widen(data[c]);
    } else {
      for (int64_t c = 0; c < channels_; ++c) to[c] = widen(data[c * of_channel_]);
    }
  }

  Source source_;
  int64_t channels_, of_sample_, of_position_, of_head_, of_channel_;
};

// The keys of each sample that its queries attend to.
class Attended {
 public:
  Attended(const std::optional<at::Tensor>& key_mask, int64_t positions) : positions_(positions) {
    if (!key_mask) return;
    listed_.emplace(key_mask->size(0));
    for (int64_t b = 0; b < key_mask->size(0); ++b) {
      const bool* mask = key_mask->const_data_ptr<bool>() + b * key_mask->stride(0);
      for (int64_t i = 0; i < positions; ++i) {
        if (mask[i * key_mask->stride(1)]) (*listed_)[b].push_back(i);
      }
    }
  }

  bool is_all() const { return !listed_; }

  int64_t count(int64_t b) const {
    return listed_ ? static_cast<int64_t>((*listed_)[b].size()) : positions_;
  }

  int64_t position(int64_t b, int64_t i) const { return listed_ ? (*listed_)[b][i] : i; }

 private:
  int64_t positions_;
  std::optional<std::vector<std::vector<int64_t>>> listed_;
};

// Rows of one head after another's: in place where they are so, otherwise copied, zeros behind.
class RowReader {
 public:
  RowReader(const at::Tensor& tensor, int64_t most_rows, int64_t padded, bool may_be_in_place)
      : heads_(tensor),
        channels_(tensor.size(3)),
        padded_(padded),
        is_in_place_(may_be_in_place && padded == channels_ && heads_.is_in_place()) {
    if (!is_in_place_) copied_ = uninitialised(most_rows * padded);
  }

  // Each is valid until the next one.
  Rows rows(int64_t b, int64_t h, int64_t first, int64_t count) const {
    if (is_in_place_) return heads_.in_place(b, h, first);
    for (int64_t i = 0; i < count; ++i) copy(b, h, first + i, i);
    return {copied_.get(), padded_};
  }

  Rows rows(int64_t b, int64_t h, const Attended& attended) const {
    if (is_in_place_) return heads_.in_place(b, h, 0);
    for (int64_t i = 0; i < attended.count(b); ++i) copy(b, h, attended.position(b, i), i);
    return {copied_.get(), padded_};
  }

 private:
  void copy(int64_t b, int64_t h, int64_t position, int64_t row) const {
    float* to = copied_.get() + row * padded_;
    heads_.copy(b, h, position, to);
    std::fill(to + channels_, to + padded_, 0.0f);
  }

  const Heads heads_;
  const int64_t channels_, padded_;
  const bool is_in_place_;
  std::unique_ptr<float[]> copied_;
};

// Rows of a dense tensor, to be computed in float32 and rounded to its type; of [0], which is not
// wanted, there are none.
class RowWriter {
 public:
  RowWriter(const at::Tensor& tensor, int64_t most_rows) {
    if (tensor.dim() != 4) return;
    target_ = target(tensor);
    positions_ = tensor.size(1);
    heads_ = tensor.size(2);
    channels_ = tensor.size(3);
    if (!is_in_place()) rounded_ = uninitialised(most_rows * channels_);
  }

  bool is_wanted() const { return target_.data; }

  // Null where not wanted.
  float* rows(int64_t b, int64_t h, int64_t first) const {
    if (!is_wanted() || !is_in_place()) return rounded_.get();
    return static_cast<float*>(target_.data) + offset(b, h, first);
  }

  int64_t stride() const { return is_in_place() ? heads_ * channels_ : channels_; }

  void zero(int64_t b, int64_t h, int64_t first, int64_t count) const {
    for (int64_t i = 0; is_wanted() && i < count; ++i) {
      std::fill_n(rows(b, h, first) + i * stride(), channels_, 0.0f);
    }
  }

  // Puts what was written to `rows` into the tensor.
  void finish(int64_t b, int64_t h, int64_t first, int64_t count) const {
    for (int64_t i = 0; is_wanted() && !is_in_place() && i < count; ++i) {
      flush(rounded_.get() + i * channels_, target_, offset(b, h, first + i), channels_);
    }
  }

 private:
  bool is_in_place() const { return target_.type == Storage::kFloat; }

  int64_t offset(int64_t b, int64_t h, int64_t position) const {
    return ((b * positions_ + position) * heads_ + h) * channels_;
  }

  Target target_;
  int64_t positions_ = 0, heads_ = 0, channels_ = 0;
  std::unique_ptr<float[]> rounded_;
};

}  // namespace fastldm
