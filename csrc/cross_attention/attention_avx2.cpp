#include "cross_attention/attention_kernels.h"

#if defined(__x86_64__)

namespace fastldm {
namespace avx2 {
const AttentionKernels* attention_table();
}

const AttentionKernels* avx2_attention() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::attention_table()
                                                                         : nullptr;
}
}  // namespace fastldm

// In force to the end of the file, where templates are instantiated.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FASTLDM_AVX2
#define FASTLDM_ISA avx2
#include "cross_attention/attention_kernels_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace fastldm {
const AttentionKernels* avx2_attention() { return nullptr; }
}  // namespace fastldm

#endif
