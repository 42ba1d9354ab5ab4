// silu(p) = p sigmoid(p) and its derivative, of a block of numbers in stages: see arithmetic.h.
#pragma once

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

}  // namespace fastldm
