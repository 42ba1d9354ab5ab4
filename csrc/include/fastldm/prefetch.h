// Requests for memory that is wanted soon, which the processor fetches while it computes.
#pragma once

#include <cstdint>

#include "fastldm/inline.h"
#include "fastldm/storage.h"

namespace fastldm {

FASTLDM_INLINE int64_t bytes_of(Storage type) {
  switch (type) {
    case Storage::kHalf:
    case Storage::kBFloat16:
      return 2;
    case Storage::kFloat:
      return 4;
    case Storage::kDouble:
      return 8;
  }
  return 0;
}

// The lines of the bytes [begin, end), into the nearest cache.
FASTLDM_INLINE void request_lines(const void* data, int64_t begin, int64_t end) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(data);
  for (int64_t at = begin; at < end; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + at), 0, 3);
  }
}

// `count` elements from `first` on, or none where there is no memory. They may lie outside of it: a
// request is no access.
FASTLDM_INLINE void prefetch(const void* data, Storage type, int64_t first, int64_t count) {
  if (!data) return;
  const int64_t bytes = bytes_of(type);
  request_lines(data, first * bytes, (first + count) * bytes);
}

// Elements that will be wanted, fetched in step with the computation of others; by default none.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes_each = 0;

  FASTLDM_INLINE Ahead() = default;
  FASTLDM_INLINE Ahead(const Source& source, int64_t first)
      : data(static_cast<const char*>(source.data) + first * bytes_of(source.type)),
        bytes_each(bytes_of(source.type)) {}

  FASTLDM_INLINE Ahead from(int64_t first) const {
    Ahead rest = *this;
    rest.data += first * bytes_each;
    return rest;
  }

  FASTLDM_INLINE void request(int64_t first, int64_t count) const {
    request_lines(data, first * bytes_each, (first + count) * bytes_each);
  }
};

}  // namespace fastldm
