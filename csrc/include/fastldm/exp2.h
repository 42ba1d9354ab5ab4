// 2^x for vectors; see simd.h for how it is included.
#pragma once

#include "fastldm/simd.h"

namespace fastldm::FASTLDM_ISA {

// 2^x of x ≤ 0 to about an ulp, and 0 below -127; NaN stays NaN.
//
// Adding 3·2^22 + 127 leaves n + 127 in the low bits, n the integer next to x; shifted up they are
// the bits of 2^n, 0 where n = -127. A product, because an addition to the exponent of NaN could
// make a number of it.
FASTLDM_INLINE Floats exp2_of_negative(Floats x) {
  // Interpolates (2^f - 1)/f at the Chebyshev nodes of |f| <= 1/2; relative error 9.2e-9.
  constexpr float kPolynomial[] = {1.0f,           0.693147182f,   0.240226507f,   0.0555035695f,
                                   0.00961808302f, 0.00133908633f, 0.000154531634f};
  constexpr float kRound = 12582912.0f + 127.0f;
  const Floats above = maximum(broadcast(-127.0f), x);
  const Floats shifted = above + broadcast(kRound);
  const Floats f = above - (shifted - broadcast(kRound));
  Floats power = broadcast(kPolynomial[6]);
  for (int i = 5; i >= 0; --i) power = multiply_add(power, f, broadcast(kPolynomial[i]));
  return power * (Floats)((Ints)shifted << 23);
}

}  // namespace fastldm::FASTLDM_ISA
