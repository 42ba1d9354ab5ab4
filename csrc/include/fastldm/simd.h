// Vector registers of the instruction set that a translation unit is compiled for.
//
// A kernel is in namespace fastldm::FASTLDM_ISA. Each file that compiles it for an instruction set
// defines FASTLDM_ISA, sets the compiler's target by a pragma and includes it, so one library
// holds every version and chooses when it runs. Kernels use nothing of the standard library: an
// inline function of it that is compiled after the pragma could be the one copy that the linker
// keeps for every processor.
#pragma once

#ifndef FASTLDM_ISA
#error "define FASTLDM_ISA before including a kernel"
#endif

#include <cstdint>

#if defined(FASTLDM_AVX2) || defined(FASTLDM_AVX512)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define FASTLDM_INLINE inline __attribute__((always_inline))

namespace fastldm::FASTLDM_ISA {

#if defined(FASTLDM_AVX512)
constexpr int kRegisterBytes = 64;
#elif defined(FASTLDM_AVX2)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

using Floats = float __attribute__((vector_size(kRegisterBytes), may_alias));
using Ints = int32_t __attribute__((vector_size(kRegisterBytes), may_alias));
constexpr int kFloats = kRegisterBytes / sizeof(float);

FASTLDM_INLINE Floats load(const float* from) {
  Floats result;
  __builtin_memcpy(&result, from, sizeof result);
  return result;
}

FASTLDM_INLINE void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }

FASTLDM_INLINE Floats broadcast(float value) { return value - Floats{}; }

// The second argument where either is NaN, as the processor's instruction has it.
FASTLDM_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// a · b + c, rounded once where the processor can; only for what carries an error bound.
FASTLDM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(FASTLDM_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FASTLDM_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Bit i is set where a[i] <= b[i].
FASTLDM_INLINE uint32_t lanes_at_most(Floats a, Floats b) {
#if defined(FASTLDM_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(FASTLDM_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmple_ps((__m128)a, (__m128)b)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kFloats; ++i) bits |= static_cast<uint32_t>(a[i] <= b[i]) << i;
  return bits;
#endif
}

FASTLDM_INLINE float smallest(Floats a) {
#if defined(FASTLDM_AVX2) || defined(FASTLDM_AVX512)
  __m256 half;
  __builtin_memcpy(&half, &a, sizeof half);
#if defined(FASTLDM_AVX512)
  __m256 upper;
  __builtin_memcpy(&upper, reinterpret_cast<const char*>(&a) + sizeof half, sizeof upper);
  half = _mm256_min_ps(half, upper);
#endif
  __m128 part = _mm_min_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  part = _mm_min_ps(part, _mm_movehl_ps(part, part));
  return _mm_cvtss_f32(_mm_min_ss(part, _mm_movehdup_ps(part)));
#else
  float result = a[0];
  for (int i = 1; i < kFloats; ++i) result = a[i] < result ? a[i] : result;
  return result;
#endif
}

FASTLDM_INLINE float largest(Floats a) { return -smallest(-a); }

}  // namespace fastldm::FASTLDM_ISA
