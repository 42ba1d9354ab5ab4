"""The reference's normal noise in Triton, bit for bit where products and sums are not fused."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language.random import philox_impl

_SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_LOG_2: tl.constexpr = tl.constexpr(math.log(2))
_ANGLE: tl.constexpr = tl.constexpr(2 * math.pi * 2.0**-24)


@triton.jit
def normal_blocks(block, seed, offset):
    """The four normal numbers of each Philox block, int64 [blocks], as [4·blocks]."""
    w0, w1, w2, w3 = _words(block, seed, offset)
    cos_0, sin_0 = _turn(w1)
    cos_1, sin_1 = _turn(w3)
    radius_0, radius_1 = _radius(w0), _radius(w2)
    even = tl.join(radius_0 * cos_0, radius_1 * cos_1)
    odd = tl.join(radius_0 * sin_0, radius_1 * sin_1)
    return tl.join(even, odd).reshape(4 * block.shape[0])


@triton.jit
def normal_elements(index, seed, offset):
    """The normal number of each index, int64, wherever it is in its block."""
    w0, w1, w2, w3 = _words(index // 4, seed, offset)
    lane = index % 4
    cosine, sine = _turn(tl.where(lane < 2, w1, w3))
    return _radius(tl.where(lane < 2, w0, w2)) * tl.where(lane % 2 == 0, cosine, sine)


@triton.jit
def _words(block, seed, offset):
    zero = block.to(tl.uint32) * 0
    return philox_impl(
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        zero + offset.to(tl.uint32),
        zero + (offset >> 32).to(tl.uint32),
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
    )


@triton.jit
def _radius(word):
    """√(−2 ln u)."""
    u = ((word >> 1).to(tl.int32).to(tl.float32) + 1.0) * 4.656612873077393e-10  # 2⁻³¹
    bits = u.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    is_small = mantissa < _SQRT_HALF
    exponent = (bits >> 23) - 126 - is_small.to(tl.int32)
    mantissa = tl.where(is_small, 2.0 * mantissa, mantissa)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    series = _polynomial(s * s, (1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9))
    logarithm = exponent.to(tl.float32) * _LOG_2 + 2.0 * s * series
    return tl.sqrt_rn(-2.0 * logarithm)


@triton.jit
def _turn(word):
    """Cosine and sine of 2πv, from the nearest quarter turn."""
    position = (word >> 8).to(tl.int32)
    quarter = (position + 2097152) >> 22  # half of a quarter turn is 2²¹
    t = (position - (quarter << 22)).to(tl.float32) * _ANGLE
    cosine = _polynomial(t * t, (1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800))
    sine = t * _polynomial(t * t, (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800))
    is_odd = (quarter & 1) != 0
    along, across = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    return (
        tl.where(((quarter + 1) & 2) != 0, -along, along),
        tl.where((quarter & 2) != 0, -across, across),
    )


@triton.jit
def _polynomial(z, SERIES: tl.constexpr):
    """By Horner's rule, the constant first."""
    total = tl.zeros_like(z) + SERIES[len(SERIES) - 1]
    for k in tl.static_range(2, len(SERIES) + 1):
        total = total * z + SERIES[len(SERIES) - k]
    return total
