// A range cut into as few equal parts as are no longer than a limit.
#pragma once

#include <cstdint>

#include "fastldm/inline.h"

namespace fastldm {

struct Parts {
  int64_t total, count;

  FASTLDM_INLINE Parts(int64_t total, int64_t longest)
      : total(total), count((total + longest - 1) / longest) {}

  FASTLDM_INLINE int64_t first(int64_t part) const { return part * total / count; }
  FASTLDM_INLINE int64_t size(int64_t part) const { return first(part + 1) - first(part); }
};

}  // namespace fastldm
