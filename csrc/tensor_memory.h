// The memory of a CPU tensor, as the kernels take it.
#pragma once

#include <ATen/core/Tensor.h>

#include "fastldm/storage.h"

namespace fastldm {

inline Storage storage_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return Storage::kHalf;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kFloat:
      return Storage::kFloat;
    case at::kDouble:
      return Storage::kDouble;
    default:
      TORCH_CHECK(false, "no kernel for ", tensor.scalar_type());
  }
}

// Null for an undefined tensor.
inline Source source(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.const_data_ptr(), storage_of(tensor)};
}

inline Target target(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.mutable_data_ptr(), storage_of(tensor)};
}

}  // namespace fastldm
