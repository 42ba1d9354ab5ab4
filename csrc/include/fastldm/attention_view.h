// Keys and values of one head as the attention kernels read them.
//
// They are packed: blocks of keys follow one another, each cut into tiles of keys,
// [channels, keys of the tile], or into tiles of channels, [keys of the block, channels of the
// tile].
#pragma once

#include <cstdint>

#include "fastldm/parts.h"

namespace fastldm {

// Keys whose scores with a panel of queries stay in the nearest cache.
constexpr int64_t kKeyBlock = 256;

FASTLDM_INLINE Parts key_blocks(int64_t count) { return {count, kKeyBlock}; }

// Packing writes up to so many numbers too far.
constexpr int64_t kPackingMargin = 8;

struct PackedHead {
  const float *keys, *values;  // by key and by channel
  int64_t count, channels;

  FASTLDM_INLINE Parts blocks() const { return key_blocks(count); }
};

struct PackedGradientHead {
  const float *keys, *values, *keys_by_channel;  // the first two by key
  int64_t count, channels, padded;               // channels with zeros behind: whole registers

  FASTLDM_INLINE Parts blocks() const { return key_blocks(count); }
};

// Rows of numbers, `stride` apart.
struct Rows {
  const float* data;
  int64_t stride;
};

}  // namespace fastldm
