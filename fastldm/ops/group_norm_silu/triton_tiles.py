"""What the forward and backward Triton kernels share: tiles of pixels and channels, and sums.

Pixels are axis 0 of every tile and channels axis 1, in both memory layouts: Triton lays the threads
out along whichever is contiguous.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastldm.ops._layout import has_channels_innermost, with_layout_of
from fastldm.ops.group_norm_silu import plan


@triton.jit
def piece(index, blocks_c, splits, CHANNELS_INNER: tl.constexpr):
    """(sample, block of channels, piece of the pixels); what is near in memory comes next."""
    if CHANNELS_INNER:
        block_c = index % blocks_c
        split = index // blocks_c % splits
    else:
        split = index % splits
        block_c = index // splits % blocks_c
    return (index // blocks_c // splits).to(tl.int64), block_c, split


@triton.jit
def pointers(ptr, b, p, c, stride_b, stride_p, stride_c):
    """Of the tile [p, c] of sample b; b, p and c are int64, so that no product overflows."""
    return ptr + b * stride_b + p[:, None] * stride_p + c[None, :] * stride_c


@triton.jit
def pixels_on(at, count, stride_p):
    """The tile that begins `count` pixels further on."""
    return at + tl.cast(count, tl.int64) * stride_p


@triton.jit
def channel_values(ptr, offsets, mask, default: tl.constexpr):
    """Float32 values [channels], or the default where there is no tensor."""
    values = tl.full(mask.shape, default, tl.float32)
    if ptr is not None:
        values = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def gain_and_offset(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, in_c, scale_stride_b, shift_stride_b
):
    """[channels] each, so that p = x̂·gain + offset."""
    factor = 1.0 + channel_values(scale_ptr, b * scale_stride_b + c, in_c, 0.0)
    gain = channel_values(weight_ptr, c, in_c, 1.0) * factor
    offset = channel_values(bias_ptr, c, in_c, 0.0) * factor
    return gain, offset + channel_values(shift_ptr, b * shift_stride_b + c, in_c, 0.0)


@triton.jit
def load_input(x_at, residual_at, add, mask, HAS_RESIDUAL: tl.constexpr):
    """h = x + channel_add + residual, float32; `add` outside."""
    h = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + add[None, :]
    if HAS_RESIDUAL:
        h += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def over_groups(values, group, GROUPS: tl.constexpr):
    """[channels] → [channels]: the sum over the group that each channel belongs to."""
    if GROUPS == 1:
        sums = tl.zeros_like(values) + tl.sum(values, 0)
    else:
        same = group[:, None] == group[None, :]
        # Selected, not multiplied: a NaN stays in its group.
        sums = tl.sum(tl.where(same, values[:, None], 0.0), 0)
    return sums


def pixel_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of sample, pixel and channel; None where the pixels are not evenly spaced."""
    sizes = [
        (size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1
    ]
    for (_, outer), (size, inner) in itertools.pairwise(sizes):
        if outer != size * inner:
            return None
    return x.stride(0), sizes[-1][1] if sizes else 1, x.stride(1)


def evenly_spaced(x: Tensor) -> Tensor:
    """`x`, copied only where its pixels are not evenly spaced."""
    return x if pixel_strides(x) is not None else with_layout_of(x, x)


def beside(t: Tensor, x: Tensor) -> Tensor:
    """`t`, copied only where its layout is not that of `x` or its pixels are not evenly spaced."""
    if has_channels_innermost(t) != has_channels_innermost(x) or 0 in t.stride():
        return with_layout_of(t, x)
    return evenly_spaced(t)


def sizes_of(x: Tensor, num_groups: int) -> plan.Sizes:
    pixels = math.prod(x.shape[2:])
    inner = has_channels_innermost(x) or pixels == 1
    return plan.Sizes(x.shape[0], x.shape[1], pixels, num_groups, inner, x.itemsize)


def rows(values: Tensor | None) -> tuple[Tensor | None, int]:
    """[B, C] with neighbouring channels, and the stride between samples."""
    if values is None:
        return None, 0
    values = values if values.stride(1) == 1 else values.contiguous()
    return values, values.stride(0)


def strides(x: Tensor | None) -> tuple[Any, ...]:
    """(sample, pixel, channel) as the kernels take them."""
    found = (0, 0, 0) if x is None else pixel_strides(x)
    assert found is not None
    return found
