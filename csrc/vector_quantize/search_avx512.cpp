#include "vector_quantize/search_kernels.h"

#if defined(__x86_64__)

namespace fastldm {
namespace avx512 {
const SearchKernels* table();
}

const SearchKernels* avx512_kernels() {
  return __builtin_cpu_supports("avx512f") ? avx512::table() : nullptr;
}
}  // namespace fastldm

// In force to the end of the file, where templates are instantiated.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma")
#endif
#define FASTLDM_AVX512
#define FASTLDM_ISA avx512
#define FASTLDM_ISA_NAME "avx512"
#include "vector_quantize/search_kernels_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace fastldm {
const SearchKernels* avx512_kernels() { return nullptr; }
}  // namespace fastldm

#endif
