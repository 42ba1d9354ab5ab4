"""GroupNorm + SiLU on a GPU; the gradients are in triton_backward.py.

With h = x + channel_add + residual, and N = (channels of a group)·(pixels)::

    μ = Σ h/N     σ² = Σ (h − μ)²/N     p = (h − μ)·gain/√(σ² + eps) + offset
    gain = weight·(1 + scale)           offset = bias·(1 + scale) + shift

A group that fits on chip is read once. Otherwise each program takes the moments of some pixels,
for each channel on its own, so that tiles need not end where groups do: 64 neighbouring channels
are 6.4 groups of 320 channels. Each lane runs Welford's recurrence (1962); lanes, pieces and
channels are joined by Chan's formula (1983) about a mean that is known by then: no sum of squares
ever holds μ².
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.ops._layout import empty_like
from fastldm.ops._triton import LAUNCH_OPTIONS, device_key, on_device_of
from fastldm.ops.group_norm_silu import plan
from fastldm.ops.group_norm_silu.triton_backward import group_norm_silu_bwd
from fastldm.ops.group_norm_silu.triton_tiles import (
    beside,
    channel_values,
    evenly_spaced,
    gain_and_offset,
    load_input,
    over_groups,
    piece,
    pixels_on,
    pointers,
    rows,
    sizes_of,
    strides,
)

__all__ = ["group_norm_silu_bwd", "group_norm_silu_fwd"]


@triton.jit
def _activate(p, SILU: tl.constexpr):
    return p / (1.0 + tl.exp(-p)) if SILU else p


@triton.jit
def _reciprocal_root(variance, eps):
    # Rounding can take it below 0, but a NaN stays one.
    return tl.div_rn(1.0, tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps))


@triton.jit
def _group_norm_silu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, add_ptr, residual_ptr, scale_ptr, shift_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    C, P, num_groups, tiles, eps, add_stride_b, scale_stride_b, shift_stride_b,
    x_stride_b, x_stride_p, x_stride_c, residual_stride_b, residual_stride_p, residual_stride_c,
    y_stride_b, y_stride_p, y_stride_c,
    SILU: tl.constexpr, GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All pixels of GROUPS groups: one read."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    lane_c = tl.arange(0, BLOCK_C)
    c = (tile * GROUPS * GROUP_CHANNELS + lane_c).to(tl.int64)
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    in_c = (lane_c < GROUPS * GROUP_CHANNELS) & (c < C)
    mask = (p < P)[:, None] & in_c[None, :]
    group = lane_c // GROUP_CHANNELS
    add = channel_values(add_ptr, b * add_stride_b + c, in_c, 0.0)
    x_at = pointers(x_ptr, b, p, c, x_stride_b, x_stride_p, x_stride_c)
    residual_at = x_at
    if residual_ptr is not None:
        residual_at = pointers(
            residual_ptr, b, p, c, residual_stride_b, residual_stride_p, residual_stride_c
        )
    h = load_input(x_at, residual_at, add, mask, residual_ptr is not None)
    total = 1.0 * P * GROUP_CHANNELS
    mean = over_groups(tl.sum(tl.where(mask, h, 0.0), 0), group, GROUPS) / total
    d = tl.where(mask, h - mean[None, :], 0.0)
    # What the rounded mean missed.
    rest = over_groups(tl.sum(d, 0), group, GROUPS) / total
    variance = over_groups(tl.sum(d * d, 0), group, GROUPS) / total - rest * rest
    rstd = _reciprocal_root(variance, eps)
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, in_c, scale_stride_b, shift_stride_b
    )
    y = _activate((d - rest[None, :]) * (rstd * gain)[None, :] + offset[None, :], SILU)
    y_at = pointers(y_ptr, b, p, c, y_stride_b, y_stride_p, y_stride_c)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)
    first = in_c & (lane_c % GROUP_CHANNELS == 0)
    statistic = b * num_groups + tile * GROUPS + group
    tl.store(mean_ptr + statistic, mean + rest, mask=first)
    tl.store(rstd_ptr + statistic, rstd, mask=first)


@triton.jit
def _group_norm_silu_fwd_moments_kernel(
    x_ptr, residual_ptr, mean_ptr, m2_ptr, C, P, span, splits, blocks_c,
    x_stride_b, x_stride_p, x_stride_c, residual_stride_b, residual_stride_p, residual_stride_c,
    CHANNELS_INNER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of `span` pixels: the mean of each channel, and the squared deviations from it."""
    b, block_c, split = piece(tl.program_id(0), blocks_c, splits, CHANNELS_INNER)
    c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = split.to(tl.int64) * span + tl.arange(0, BLOCK_P)
    in_c = c < C
    x_at = pointers(x_ptr, b, p, c, x_stride_b, x_stride_p, x_stride_c)
    residual_at = x_at
    if residual_ptr is not None:
        residual_at = pointers(
            residual_ptr, b, p, c, residual_stride_b, residual_stride_p, residual_stride_c
        )
    zero = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, span, BLOCK_P):
        mask = (p + start < P)[:, None] & in_c[None, :]
        h = load_input(
            pixels_on(x_at, start, x_stride_p),
            pixels_on(residual_at, start, residual_stride_p),
            zero,
            mask,
            residual_ptr is not None,
        )
        d = tl.where(mask, h - mean, 0.0)
        # Exactly 1 for the first tile, so that a constant has no variance at all.
        mean += d * tl.where(start == 0, 1.0, BLOCK_P / (start + BLOCK_P))
        m2 += d * (h - mean)
    # How many pixels each lane has seen.
    count = tl.minimum((P - p + BLOCK_P - 1) // BLOCK_P, span // BLOCK_P).to(tl.float32)
    count = tl.maximum(count, 0.0)
    total = tl.sum(count, 0)
    centre = tl.sum(mean * count[:, None], 0) / total
    d = mean - centre[None, :]
    rest = tl.sum(d * count[:, None], 0) / total
    m2_c = tl.sum(m2 + d * d * count[:, None], 0) - rest * rest * total
    at = (b * splits + split) * C + c
    tl.store(mean_ptr + at, centre + rest, mask=in_c)
    tl.store(m2_ptr + at, m2_c, mask=in_c)


@triton.jit
def _group_norm_silu_fwd_combine_kernel(
    partial_mean_ptr, partial_m2_ptr, add_ptr, mean_ptr, rstd_ptr,
    C, P, num_groups, group_channels, span, splits, eps, add_stride_b,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1/√(variance + eps) of a group, from the moments of its pieces and channels."""
    b = (tl.program_id(0) // num_groups).to(tl.int64)
    lane_c = tl.arange(0, BLOCK_C)
    in_c = lane_c < group_channels
    c = tl.program_id(0) % num_groups * group_channels + lane_c
    lane_s = tl.arange(0, BLOCK_S)
    add = channel_values(add_ptr, b * add_stride_b + c, in_c, 0.0)
    total = 1.0 * P * group_channels
    weighted = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + lane_s
        mask = (s < splits)[:, None] & in_c[None, :]
        count = tl.minimum(P - s.to(tl.int64) * span, span).to(tl.float32)
        at = (b * splits + s)[:, None] * C + c[None, :]
        means = tl.load(partial_mean_ptr + at, mask=mask, other=0.0) + add[None, :]
        weighted += tl.where(mask, means * count[:, None], 0.0)
    mean = tl.sum(tl.sum(weighted, 0), 0) / total
    deviation = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + lane_s
        mask = (s < splits)[:, None] & in_c[None, :]
        count = tl.minimum(P - s.to(tl.int64) * span, span).to(tl.float32)
        at = (b * splits + s)[:, None] * C + c[None, :]
        means = tl.load(partial_mean_ptr + at, mask=mask, other=0.0) + add[None, :]
        d = tl.where(mask, means - mean, 0.0)
        deviation += d * count[:, None]
        m2 += d * d * count[:, None] + tl.load(partial_m2_ptr + at, mask=mask, other=0.0)
    rest = tl.sum(tl.sum(deviation, 0), 0) / total
    variance = tl.sum(tl.sum(m2, 0), 0) / total - rest * rest
    tl.store(mean_ptr + tl.program_id(0), mean + rest)
    tl.store(rstd_ptr + tl.program_id(0), _reciprocal_root(variance, eps))


@triton.jit
def _group_norm_silu_fwd_apply_kernel(
    x_ptr, weight_ptr, bias_ptr, add_ptr, residual_ptr, scale_ptr, shift_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    C, P, num_groups, group_channels, span, splits, blocks_c,
    add_stride_b, scale_stride_b, shift_stride_b,
    x_stride_b, x_stride_p, x_stride_c, residual_stride_b, residual_stride_p, residual_stride_c,
    y_stride_b, y_stride_p, y_stride_c,
    SILU: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Backwards: what the moments were last taken of is still in the cache.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    b, block_c, split = piece(index, blocks_c, splits, CHANNELS_INNER)
    c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = split.to(tl.int64) * span + tl.arange(0, BLOCK_P)
    in_c = c < C
    add = channel_values(add_ptr, b * add_stride_b + c, in_c, 0.0)
    statistic = b * num_groups + c // group_channels
    mean = tl.load(mean_ptr + statistic, mask=in_c, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=in_c, other=0.0)
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, in_c, scale_stride_b, shift_stride_b
    )
    gain *= rstd
    x_at = pointers(x_ptr, b, p, c, x_stride_b, x_stride_p, x_stride_c)
    residual_at = x_at
    if residual_ptr is not None:
        residual_at = pointers(
            residual_ptr, b, p, c, residual_stride_b, residual_stride_p, residual_stride_c
        )
    y_at = pointers(y_ptr, b, p, c, y_stride_b, y_stride_p, y_stride_c)
    for start in range(0, span, BLOCK_P):
        mask = (p + start < P)[:, None] & in_c[None, :]
        h = load_input(
            pixels_on(x_at, start, x_stride_p),
            pixels_on(residual_at, start, residual_stride_p),
            add,
            mask,
            residual_ptr is not None,
        )
        y = _activate((h - mean[None, :]) * gain[None, :] + offset[None, :], SILU)
        tl.store(pixels_on(y_at, start, y_stride_p), y.to(y_ptr.dtype.element_ty), mask=mask)


def group_norm_silu_fwd(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of x; μ and 1/√(σ² + eps), [B, num_groups]."""
    y = empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    if not x.numel():
        return y, mean, rstd
    sizes, device = sizes_of(x, num_groups), device_key(x.device)
    x = evenly_spaced(x)
    residual = None if residual is None else beside(residual, x)
    weight, bias = (v if v is None else v.contiguous() for v in (weight, bias))
    (add, add_stride), (scale, scale_stride), (shift, shift_stride) = map(
        rows, (channel_add, scale, shift)
    )
    operands = (x, weight, bias, add, residual, scale, shift)
    row_strides = (add_stride, scale_stride, shift_stride)
    spacing = (*strides(x), *strides(residual), *strides(y))
    with on_device_of(x):
        tiles = plan.whole("fwd", device, sizes)
        if tiles is not None:
            per_sample = -(-num_groups // tiles.groups)
            _group_norm_silu_fwd_kernel[(sizes.batch * per_sample,)](
                *operands, y, mean, rstd, sizes.channels, sizes.pixels, num_groups, per_sample,
                eps, *row_strides, *spacing,
                SILU=silu, GROUP_CHANNELS=sizes.group_channels, GROUPS=tiles.groups,
                BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c, num_warps=tiles.num_warps,
                **LAUNCH_OPTIONS,
            )  # fmt: skip
            return y, mean, rstd
        _statistics(x, residual, add, add_stride, mean, rstd, eps, sizes, device)
        cut = plan.split("apply", device, sizes)
        _group_norm_silu_fwd_apply_kernel[(sizes.batch * cut.blocks_c * cut.splits,)](
            *operands, y, mean, rstd, sizes.channels, sizes.pixels, num_groups,
            sizes.group_channels, cut.span, cut.splits, cut.blocks_c, *row_strides, *spacing,
            SILU=silu, CHANNELS_INNER=sizes.channels_inner,
            BLOCK_P=cut.block_p, BLOCK_C=cut.block_c, num_warps=cut.num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return y, mean, rstd


def _statistics(
    x: Tensor,
    residual: Tensor | None,
    add: Tensor | None,
    add_stride: int,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    sizes: plan.Sizes,
    device: str,
) -> None:
    """Fill mean and rstd, [B, num_groups]."""
    cut = plan.split("moments", device, sizes)
    shape = (2, sizes.batch, cut.splits, sizes.channels)
    partial_mean, partial_m2 = x.new_empty(shape, dtype=torch.float32)
    _group_norm_silu_fwd_moments_kernel[(sizes.batch * cut.blocks_c * cut.splits,)](
        x, residual, partial_mean, partial_m2, sizes.channels, sizes.pixels, cut.span, cut.splits,
        cut.blocks_c, *strides(x), *strides(residual), CHANNELS_INNER=sizes.channels_inner,
        BLOCK_P=cut.block_p, BLOCK_C=cut.block_c, num_warps=cut.num_warps, **LAUNCH_OPTIONS,
    )  # fmt: skip
    block_s, block_c = plan.combining(sizes, cut)
    _group_norm_silu_fwd_combine_kernel[(sizes.batch * sizes.num_groups,)](
        partial_mean, partial_m2, add, mean, rstd, sizes.channels, sizes.pixels, sizes.num_groups,
        sizes.group_channels, cut.span, cut.splits, eps, add_stride,
        BLOCK_S=block_s, BLOCK_C=block_c, num_warps=4, **LAUNCH_OPTIONS,
    )  # fmt: skip
