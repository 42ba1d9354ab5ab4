// Products of packed rows with a panel of two registers; see simd.h for how it is included.
#pragma once

#include "fastldm/simd.h"

namespace fastldm::FASTLDM_ISA {

constexpr int kPanel = 2 * kFloats;
// Rows whose products are in registers at once: 12 accumulators of 16 registers, 16 of 32.
#if defined(FASTLDM_AVX512)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif

// A number for each lane of a panel.
struct Pair {
  Floats low, high;
};

FASTLDM_INLINE Pair load_pair(const float* from) { return {load(from), load(from + kFloats)}; }

FASTLDM_INLINE void store_pair(float* to, Pair value) {
  store(to, value.low);
  store(to + kFloats, value.high);
}

FASTLDM_INLINE Pair larger(Pair a, Pair b) {
  return {maximum(a.low, b.low), maximum(a.high, b.high)};
}

FASTLDM_INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }

FASTLDM_INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }

FASTLDM_INLINE Pair multiply_add(Pair a, Pair b, Pair c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}

// Calls f.run<R>() with R = rows, which are 1 to kRows.
template <int R = kRows, typename F>
FASTLDM_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, f);
  }
  f.template run<R>();
}

// The products of R rows, [depth, R], with a panel, [depth, kPanel]; the depth is at least 1.
template <int R>
FASTLDM_INLINE void multiply(const float* rows, const float* panel, int64_t depth,
                             Pair (&sums)[R]) {
  const Pair first = load_pair(panel);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Floats left = broadcast(rows[r]);
    sums[r] = {left * first.low, left * first.high};
  }
#pragma GCC unroll 4
  for (int64_t p = 1; p < depth; ++p) {
    const Pair right = load_pair(panel + p * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats left = broadcast(rows[p * R + r]);
      sums[r] = multiply_add({left, left}, right, sums[r]);
    }
  }
}

}  // namespace fastldm::FASTLDM_ISA
