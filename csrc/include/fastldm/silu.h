// silu(p) = p sigmoid(p) and its derivative, of a block of numbers in stages: see arithmetic.h.
#pragma once

#include <cstdint>

#include "fastldm/arithmetic.h"

namespace fastldm {

template <bool kFused, int kCount, typename T>
FASTLDM_INLINE void one_plus_exp_of_negative(const T* p, const ExpLimits<T>& limits, T* sum) {
  T half[kCount];
  half_exp_of_negative<kFused, kCount>(p, limits, half);
  for (int i = 0; i < kCount; ++i) sum[i] = multiply_add<kFused>(half[i], T(2), T(1));
}

template <bool kFused, int kCount, typename T>
FASTLDM_INLINE void silu(const T* p, const ExpLimits<T>& limits, T* y) {
  T denominator[kCount];
  one_plus_exp_of_negative<kFused, kCount>(p, limits, denominator);
  for (int i = 0; i < kCount; ++i) y[i] = p[i] / denominator[i];
}

// d silu(p)/dp = s (1 + p (1 - s)) with s = sigmoid(p)
template <bool kFused, int kCount, typename T>
FASTLDM_INLINE void silu_derivative(const T* p, const ExpLimits<T>& limits, T* derivative) {
  T denominator[kCount], s[kCount];
  one_plus_exp_of_negative<kFused, kCount>(p, limits, denominator);
  for (int i = 0; i < kCount; ++i) s[i] = T(1) / denominator[i];
  for (int i = 0; i < kCount; ++i) {
    derivative[i] = s[i] * multiply_add<kFused>(p[i], T(1) - s[i], T(1));
  }
}

// In the place of p.
template <typename Processor, typename T>
FASTLDM_INLINE void silu(T* p, int64_t count, const ExpLimits<T>& limits) {
  constexpr int kCount = kBlock<Processor, T>;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) silu<Processor::kFused, kCount>(p + i, limits, p + i);
  for (; i < count; ++i) silu<Processor::kFused, 1>(p + i, limits, p + i);
}

// The gradient of p in its place, from that of silu(p).
template <typename Processor, typename T>
FASTLDM_INLINE void silu_gradient(const T* __restrict__ grad, int64_t count,
                                  const ExpLimits<T>& limits, T* __restrict__ p) {
  constexpr int kCount = kBlock<Processor, T>;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) {
    T derivative[kCount];
    silu_derivative<Processor::kFused, kCount>(p + i, limits, derivative);
    for (int j = 0; j < kCount; ++j) p[i + j] = grad[i + j] * derivative[j];
  }
  for (; i < count; ++i) {
    T derivative;
    silu_derivative<Processor::kFused, 1>(p + i, limits, &derivative);
    p[i] = grad[i] * derivative;
  }
}

}  // namespace fastldm
