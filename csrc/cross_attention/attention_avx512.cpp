#include "cross_attention/attention_kernels.h"

#if defined(__x86_64__)

namespace fastldm {
namespace avx512 {
const AttentionKernels* attention_table();
}

const AttentionKernels* avx512_attention() {
  return __builtin_cpu_supports("avx512f") ? avx512::attention_table() : nullptr;
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
#include "cross_attention/attention_kernels_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace fastldm {
const AttentionKernels* avx512_attention() { return nullptr; }
}  // namespace fastldm

#endif
