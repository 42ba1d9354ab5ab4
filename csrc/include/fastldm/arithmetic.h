// Scalar arithmetic, free of branches and calls, so that a loop over it becomes vector code.
#pragma once

#include <bit>
#include <cstdint>

#include "fastldm/inline.h"

namespace fastldm {

template <bool kFused>
FASTLDM_INLINE float multiply_add(float a, float b, float c) {
  if constexpr (kFused) {
    return __builtin_fmaf(a, b, c);
  } else {
    return a * b + c;
  }
}

template <bool kFused>
FASTLDM_INLINE double multiply_add(double a, double b, double c) {
  if constexpr (kFused) {
    return __builtin_fma(a, b, c);
  } else {
    return a * b + c;
  }
}

// The polynomial in r with these coefficients, the constant first. By recursion, because a loop
// inside would keep the caller's loop from becoming vector code.
template <bool kFused, int kFirst = 0, typename T, int kCount>
FASTLDM_INLINE T polynomial(const T (&coefficients)[kCount], T r) {
  if constexpr (kFirst == kCount - 1) {
    return coefficients[kFirst];
  } else {
    return multiply_add<kFused>(polynomial<kFused, kFirst + 1>(coefficients, r), r,
                                coefficients[kFirst]);
  }
}

// What exp needs to know of a type. Adding `round` to z leaves the integer next to z in the low
// bits; ln 2 is split so that an unfused multiple of its first part is exact.
template <typename T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kLog2E = 1.44269502f, kRound = 12582912.0f;
  static constexpr float kLn2 = 0.693147182f, kLn2High = 0.693359375f, kLn2Low = -2.12194442e-4f;
  static constexpr float kSmallest = -89.0f, kLargest = 86.0f;
  // Interpolates exp(-r)/2 at the Chebyshev nodes of |r| <= ln(2)/2; relative error 2.0e-8.
  static constexpr float kPolynomial[] = {
      0.5f, -0.5f, 0.25f, -0.0833320767f, 0.0208331756f, -0.00418756716f, 0.000697055948f};
};

template <>
struct ExpTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kLog2E = 1.4426950408889634, kRound = 6755399441055744.0;
  static constexpr double kLn2 = 0.6931471805599453, kLn2High = 0.693147180369123816490;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kSmallest = -710.0, kLargest = 707.0;
  // Taylor's; relative error 4e-18.
  static constexpr double kPolynomial[] = {
      1.0 / 2,       -1.0 / 2,        1.0 / 4,           -1.0 / 12,           1.0 / 48,
      -1.0 / 240,    1.0 / 1440,      -1.0 / 10080,      1.0 / 80640,         -1.0 / 725760,
      1.0 / 7257600, -1.0 / 79833600, 1.0 / 958003200.0, -1.0 / 12454041600.0};
};

// The limits of exp's argument, hidden from the compiler: it would turn a comparison with a
// constant into a branch, and the caller's loop with it.
template <typename T>
struct ExpLimits {
  T smallest = ExpTraits<T>::kSmallest, largest = ExpTraits<T>::kLargest;

  FASTLDM_INLINE ExpLimits() { __asm__("" : "+m"(smallest), "+m"(largest)); }
};

// -p = n ln 2 - r: n in the low bits of `shifted`, and r.
template <bool kFused, typename T>
FASTLDM_INLINE void reduce(T p, const ExpLimits<T>& limits, T& shifted, T& r) {
  using Traits = ExpTraits<T>;
  const T above = p < limits.smallest ? limits.smallest : p;
  const T q = above > limits.largest ? limits.largest : above;
  shifted = multiply_add<kFused>(q, -Traits::kLog2E, Traits::kRound);
  const T n = shifted - Traits::kRound;
  if constexpr (kFused) {
    r = multiply_add<true>(n, Traits::kLn2, q);
  } else {
    r = n * Traits::kLn2Low + (n * Traits::kLn2High + q);
  }
}

// 2^n exp(-r)/2, where n is added to the exponent of exp(-r)/2. The halving lets n reach past the
// largest exponent, so that doubling the result overflows to infinity where exp does.
template <bool kFused, typename T>
FASTLDM_INLINE T half_exp(T shifted, T r) {
  using Traits = ExpTraits<T>;
  using Bits = typename Traits::Bits;
  const T half = polynomial<kFused>(Traits::kPolynomial, r);
  return std::bit_cast<T>(std::bit_cast<Bits>(half) +
                          (std::bit_cast<Bits>(shifted) << Traits::kMantissa));
}

// exp(-p)/2 of so many numbers, to about an ulp; nearly 0 for large p.
//
// Such a formula is computed for a block of numbers, stage by stage: the operations of one number
// wait for each other, and a processor does not look far enough ahead to find work beside them. A
// stage is a loop over the block, which a compiler turns into a few vector operations.
template <bool kFused, int kCount, typename T>
FASTLDM_INLINE void half_exp_of_negative(const T* p, const ExpLimits<T>& limits, T* half) {
  T shifted[kCount], r[kCount];
  for (int i = 0; i < kCount; ++i) reduce<kFused>(p[i], limits, shifted[i], r[i]);
  for (int i = 0; i < kCount; ++i) half[i] = half_exp<kFused>(shifted[i], r[i]);
}

// Numbers in a block: four registers, so that several arrays of them find room. For registers of 16
// bytes it is one, and a loop over blocks is what the compiler makes vector operations of.
template <typename Processor, typename T>
constexpr int kBlock =
    Processor::kRegisterBytes > 16 ? 4 * Processor::kRegisterBytes / static_cast<int>(sizeof(T))
                                   : 1;

}  // namespace fastldm
