// Numbers as they are stored, and their conversion to those that are computed with.
//
// Halves are converted in integer operations alone, which every instruction set has as vectors.
#pragma once

#include <bit>
#include <cstdint>

#include "fastldm/inline.h"

namespace fastldm {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

FASTLDM_INLINE float widen(float value) { return value; }
FASTLDM_INLINE double widen(double value) { return value; }

FASTLDM_INLINE float widen(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

FASTLDM_INLINE float widen(Half value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t bits = value.bits, magnitude = (bits & 0x7FFF) << 13;
  const bool is_subnormal = magnitude < 1u << 23, is_special = magnitude >= 31u << 23;
  const float subnormal = static_cast<float>(static_cast<int32_t>(bits & 0x3FF)) * 0x1p-24f;
  const uint32_t normal = magnitude + kRebias + (is_special ? kRebias : 0);
  const uint32_t result = is_subnormal ? std::bit_cast<uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(result | ((bits & 0x8000) << 16));
}

template <typename S>
S narrow(float value);

template <>
FASTLDM_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const uint32_t result = (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
  return {static_cast<uint16_t>(result)};
}

template <>
FASTLDM_INLINE Half narrow<Half>(float value) {
  constexpr uint32_t kRebias = (127 - 15) << 23, kInfinity = 0x7F800000;
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFF;
  // The addition rounds to the spacing of subnormal halves, which is that of floats at 1/2.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const uint32_t normal = (magnitude - kRebias + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const uint32_t special = magnitude > kInfinity ? 0x7E00 : 0x7C00;
  const uint32_t finite = magnitude < (127 - 14) << 23 ? subnormal : normal;
  const uint32_t result = magnitude >= (127 + 16) << 23 ? special : finite;
  return {static_cast<uint16_t>(result | (bits >> 16 & 0x8000))};
}

enum class Storage { kHalf, kBFloat16, kFloat, kDouble };

// Elements in memory: to be read, and to be written.
struct Source {
  const void* data = nullptr;
  Storage type = Storage::kFloat;
};

struct Target {
  void* data = nullptr;
  Storage type = Storage::kFloat;
};

template <typename T>
FASTLDM_INLINE bool is_stored_as(Storage type) {
  return type == (sizeof(T) == sizeof(float) ? Storage::kFloat : Storage::kDouble);
}

template <typename S, typename T>
FASTLDM_INLINE void convert(const void* data, int64_t first, int64_t count, T* __restrict__ to) {
  const S* __restrict__ from = static_cast<const S*>(data) + first;
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
}

// Elements as T: in place where they are stored so, otherwise converted into the buffer.
template <typename T>
FASTLDM_INLINE const T* read(const Source& source, int64_t first, int64_t count, T* buffer) {
  if (is_stored_as<T>(source.type)) return static_cast<const T*>(source.data) + first;
  switch (source.type) {
    case Storage::kHalf:
      convert<Half>(source.data, first, count, buffer);
      break;
    case Storage::kBFloat16:
      convert<BFloat16>(source.data, first, count, buffer);
      break;
    case Storage::kFloat:
      convert<float>(source.data, first, count, buffer);
      break;
    case Storage::kDouble:
      convert<double>(source.data, first, count, buffer);
      break;
  }
  return buffer;
}

// The same of what is stored as T or, for a float, in half of its bits.
template <typename T>
FASTLDM_INLINE const T* read_upward(const Source& source, int64_t first, int64_t count, T* buffer) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (source.type == Storage::kHalf) {
      convert<Half>(source.data, first, count, buffer);
      return buffer;
    }
    if (source.type == Storage::kBFloat16) {
      convert<BFloat16>(source.data, first, count, buffer);
      return buffer;
    }
  }
  return static_cast<const T*>(source.data) + first;
}

// Where to put elements that are computed as T: the target itself, or the buffer, to be flushed.
template <typename T>
FASTLDM_INLINE T* room(const Target& target, int64_t first, T* buffer) {
  return is_stored_as<T>(target.type) ? static_cast<T*>(target.data) + first : buffer;
}

template <typename S>
FASTLDM_INLINE void round_to(const float* __restrict__ from, void* data, int64_t first,
                             int64_t count) {
  S* __restrict__ to = static_cast<S*>(data) + first;
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<S>(from[i]);
}

// Rounds what is in the buffer of `room` into the target; float64 is never there.
template <typename T>
FASTLDM_INLINE void flush(const T* buffer, const Target& target, int64_t first, int64_t count) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (target.type == Storage::kHalf) round_to<Half>(buffer, target.data, first, count);
    if (target.type == Storage::kBFloat16) round_to<BFloat16>(buffer, target.data, first, count);
  }
}

}  // namespace fastldm
