// Kernels that are called past torch's dispatcher and seen by profilers all the same.
#pragma once

#include <ATen/record_function.h>

#include <string>
#include <string_view>
#include <utility>

namespace fastldm {

// A kernel that profilers see as they see the operators that torch's dispatcher calls.
template <typename Result, typename... Arguments>
auto recorded(const char* name, Result (*kernel)(Arguments...)) {
  return [name = std::string("fastldm::") + name, kernel](Arguments... arguments) {
    RECORD_FUNCTION(std::string_view(name), c10::ArrayRef<const c10::IValue>{});
    return kernel(std::forward<Arguments>(arguments)...);
  };
}

}  // namespace fastldm
