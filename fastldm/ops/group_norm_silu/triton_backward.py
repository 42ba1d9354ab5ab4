"""The gradients of GroupNorm + SiLU on a GPU, in the notation of triton_kernel.py.

With x̂ = (h − μ)·rstd, p = x̂·gain + offset and g the gradient of y::

    dp = g·σ(p)·(1 + p·(1 − σ(p)))          (g itself without the activation)

and three sums over the pixels of each sample and channel, A = Σ dp, D = Σ dp·x̂ and X = Σ x̂::

    S₁ = Σ gain·A/N    S₂ = Σ gain·D/N      over the channels of a group
    dh = rstd·(gain·dp − S₁ − x̂·S₂)         of x and of residual
    dchannel_add = Σ dh = rstd·(gain·A − P·S₁ − X·S₂)
    dscale = weight·D + bias·A              dshift = A
    dweight = Σ (1 + scale)·D               dbias = Σ (1 + scale)·A        over the samples

As forward: one read where a group fits on chip; otherwise sums by pieces, joined, then applied.
Every sum has one order, whatever runs first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.ops._layout import empty_like
from fastldm.ops._triton import LAUNCH_OPTIONS, device_key, on_device_of
from fastldm.ops.group_norm_silu import plan
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


@triton.jit
def _gradient_before_activation(grad_at, x_hat, gain, offset, mask, SILU: tl.constexpr):
    """dp, 0 outside."""
    g = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        n = x_hat * gain[None, :] + offset[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-n))
        g = tl.where(mask, g * sigmoid * (1.0 + n * (1.0 - sigmoid)), 0.0)
    return g


@triton.jit
def _store_sample_gradients(
    weight_ptr, bias_ptr, dadd_ptr, dscale_ptr, dshift_ptr,
    sum_dp, sum_dp_x, sum_x, gain, rstd, s1, s2, P, at, c, in_c,
):  # fmt: skip
    """dchannel_add, dscale and dshift of some channels of one sample; each dense, [B, C]."""
    if dadd_ptr is not None:
        dadd = rstd * (gain * sum_dp - s1 * P - sum_x * s2)
        tl.store(dadd_ptr + at, dadd.to(dadd_ptr.dtype.element_ty), mask=in_c)
    if dscale_ptr is not None:
        weight = channel_values(weight_ptr, c, in_c, 1.0)
        dscale = weight * sum_dp_x + channel_values(bias_ptr, c, in_c, 0.0) * sum_dp
        tl.store(dscale_ptr + at, dscale.to(dscale_ptr.dtype.element_ty), mask=in_c)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + at, sum_dp.to(dshift_ptr.dtype.element_ty), mask=in_c)


@triton.jit
def _group_norm_silu_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, add_ptr, residual_ptr, scale_ptr, shift_ptr,
    mean_ptr, rstd_ptr, dx_ptr, dadd_ptr, dscale_ptr, dshift_ptr, sum_dp_ptr, sum_dp_x_ptr,
    C, P, num_groups, tiles, add_stride_b, scale_stride_b, shift_stride_b,
    grad_stride_b, grad_stride_p, grad_stride_c, x_stride_b, x_stride_p, x_stride_c,
    residual_stride_b, residual_stride_p, residual_stride_c, dx_stride_b, dx_stride_p, dx_stride_c,
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
    statistic = b * num_groups + tile * GROUPS + group
    mean = tl.load(mean_ptr + statistic, mask=in_c, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=in_c, other=0.0)
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, in_c, scale_stride_b, shift_stride_b
    )
    add = channel_values(add_ptr, b * add_stride_b + c, in_c, 0.0)
    x_at = pointers(x_ptr, b, p, c, x_stride_b, x_stride_p, x_stride_c)
    residual_at = x_at
    if residual_ptr is not None:
        residual_at = pointers(
            residual_ptr, b, p, c, residual_stride_b, residual_stride_p, residual_stride_c
        )
    grad_at = pointers(grad_ptr, b, p, c, grad_stride_b, grad_stride_p, grad_stride_c)
    h = load_input(x_at, residual_at, add, mask, residual_ptr is not None)
    x_hat = tl.where(mask, (h - mean[None, :]) * rstd[None, :], 0.0)
    dp = _gradient_before_activation(grad_at, x_hat, gain, offset, mask, SILU)
    sum_dp = tl.sum(dp, 0)
    sum_dp_x = tl.sum(dp * x_hat, 0)
    sum_x = tl.sum(x_hat, 0)
    total = 1.0 * P * GROUP_CHANNELS
    s1 = over_groups(gain * sum_dp, group, GROUPS) / total
    s2 = over_groups(gain * sum_dp_x, group, GROUPS) / total
    if dx_ptr is not None:
        dx = (dp * gain[None, :] - s1[None, :] - x_hat * s2[None, :]) * rstd[None, :]
        dx_at = pointers(dx_ptr, b, p, c, dx_stride_b, dx_stride_p, dx_stride_c)
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    _store_sample_gradients(
        weight_ptr, bias_ptr, dadd_ptr, dscale_ptr, dshift_ptr, sum_dp, sum_dp_x, sum_x, gain,
        rstd, s1, s2, P, b * C + c, c, in_c,
    )  # fmt: skip
    if sum_dp_ptr is not None:
        tl.store(sum_dp_ptr + b * C + c, sum_dp, mask=in_c)
        tl.store(sum_dp_x_ptr + b * C + c, sum_dp_x, mask=in_c)


@triton.jit
def _group_norm_silu_bwd_sums_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, add_ptr, residual_ptr, scale_ptr, shift_ptr,
    mean_ptr, rstd_ptr, sum_dp_ptr, sum_dp_x_ptr, sum_x_ptr,
    C, P, num_groups, group_channels, span, splits, blocks_c,
    add_stride_b, scale_stride_b, shift_stride_b,
    grad_stride_b, grad_stride_p, grad_stride_c, x_stride_b, x_stride_p, x_stride_c,
    residual_stride_b, residual_stride_p, residual_stride_c,
    SILU: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A, D and X of `span` pixels."""
    b, block_c, split = piece(tl.program_id(0), blocks_c, splits, CHANNELS_INNER)
    c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = split.to(tl.int64) * span + tl.arange(0, BLOCK_P)
    in_c = c < C
    statistic = b * num_groups + c // group_channels
    mean = tl.load(mean_ptr + statistic, mask=in_c, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=in_c, other=0.0)
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, in_c, scale_stride_b, shift_stride_b
    )
    add = channel_values(add_ptr, b * add_stride_b + c, in_c, 0.0)
    x_at = pointers(x_ptr, b, p, c, x_stride_b, x_stride_p, x_stride_c)
    residual_at = x_at
    if residual_ptr is not None:
        residual_at = pointers(
            residual_ptr, b, p, c, residual_stride_b, residual_stride_p, residual_stride_c
        )
    grad_at = pointers(grad_ptr, b, p, c, grad_stride_b, grad_stride_p, grad_stride_c)
    sum_dp = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dp_x = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_x = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, span, BLOCK_P):
        mask = (p + start < P)[:, None] & in_c[None, :]
        h = load_input(
            pixels_on(x_at, start, x_stride_p),
            pixels_on(residual_at, start, residual_stride_p),
            add,
            mask,
            residual_ptr is not None,
        )
        x_hat = tl.where(mask, (h - mean[None, :]) * rstd[None, :], 0.0)
        dp = _gradient_before_activation(
            pixels_on(grad_at, start, grad_stride_p), x_hat, gain, offset, mask, SILU
        )
        sum_dp += dp
        sum_dp_x += dp * x_hat
        if sum_x_ptr is not None:
            sum_x += x_hat
    at = (b * splits + split) * C + c
    tl.store(sum_dp_ptr + at, tl.sum(sum_dp, 0), mask=in_c)
    tl.store(sum_dp_x_ptr + at, tl.sum(sum_dp_x, 0), mask=in_c)
    if sum_x_ptr is not None:
        tl.store(sum_x_ptr + at, tl.sum(sum_x, 0), mask=in_c)


@triton.jit
def _group_norm_silu_bwd_combine_kernel(
    sum_dp_ptr, sum_dp_x_ptr, sum_x_ptr, weight_ptr, bias_ptr, scale_ptr, rstd_ptr,
    s1_ptr, s2_ptr, dadd_ptr, dscale_ptr, dshift_ptr, total_dp_ptr, total_dp_x_ptr,
    C, P, num_groups, group_channels, splits, scale_stride_b,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S₁ and S₂ of a group, and what follows for its channels, from the sums of the pieces."""
    b = (tl.program_id(0) // num_groups).to(tl.int64)
    lane_c = tl.arange(0, BLOCK_C)
    in_c = lane_c < group_channels
    c = tl.program_id(0) % num_groups * group_channels + lane_c
    dp = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    dp_x = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    x = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < splits)[:, None] & in_c[None, :]
        at = (b * splits + s)[:, None] * C + c[None, :]
        dp += tl.load(sum_dp_ptr + at, mask=mask, other=0.0)
        dp_x += tl.load(sum_dp_x_ptr + at, mask=mask, other=0.0)
        if sum_x_ptr is not None:
            x += tl.load(sum_x_ptr + at, mask=mask, other=0.0)
    sum_dp = tl.sum(dp, 0)
    sum_dp_x = tl.sum(dp_x, 0)
    gain, _ = gain_and_offset(weight_ptr, None, scale_ptr, None, b, c, in_c, scale_stride_b, 0)
    total = 1.0 * P * group_channels
    s1 = tl.sum(gain * sum_dp, 0) / total
    s2 = tl.sum(gain * sum_dp_x, 0) / total
    tl.store(s1_ptr + tl.program_id(0), s1)
    tl.store(s2_ptr + tl.program_id(0), s2)
    _store_sample_gradients(
        weight_ptr, bias_ptr, dadd_ptr, dscale_ptr, dshift_ptr, sum_dp, sum_dp_x, tl.sum(x, 0),
        gain, tl.load(rstd_ptr + tl.program_id(0)), s1, s2, P, b * C + c, c, in_c,
    )  # fmt: skip
    if total_dp_ptr is not None:
        tl.store(total_dp_ptr + b * C + c, sum_dp, mask=in_c)
        tl.store(total_dp_x_ptr + b * C + c, sum_dp_x, mask=in_c)


@triton.jit
def _group_norm_silu_bwd_apply_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, add_ptr, residual_ptr, scale_ptr, shift_ptr,
    mean_ptr, rstd_ptr, s1_ptr, s2_ptr, dx_ptr,
    C, P, num_groups, group_channels, span, splits, blocks_c,
    add_stride_b, scale_stride_b, shift_stride_b,
    grad_stride_b, grad_stride_p, grad_stride_c, x_stride_b, x_stride_p, x_stride_c,
    residual_stride_b, residual_stride_p, residual_stride_c, dx_stride_b, dx_stride_p, dx_stride_c,
    SILU: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Backwards: what was last summed is still in the cache.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    b, block_c, split = piece(index, blocks_c, splits, CHANNELS_INNER)
    c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = split.to(tl.int64) * span + tl.arange(0, BLOCK_P)
    in_c = c < C
    statistic = b * num_groups + c // group_channels
    mean = tl.load(mean_ptr + statistic, mask=in_c, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=in_c, other=0.0)
    s1 = tl.load(s1_ptr + statistic, mask=in_c, other=0.0)
    s2 = tl.load(s2_ptr + statistic, mask=in_c, other=0.0)
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, in_c, scale_stride_b, shift_stride_b
    )
    add = channel_values(add_ptr, b * add_stride_b + c, in_c, 0.0)
    x_at = pointers(x_ptr, b, p, c, x_stride_b, x_stride_p, x_stride_c)
    residual_at = x_at
    if residual_ptr is not None:
        residual_at = pointers(
            residual_ptr, b, p, c, residual_stride_b, residual_stride_p, residual_stride_c
        )
    grad_at = pointers(grad_ptr, b, p, c, grad_stride_b, grad_stride_p, grad_stride_c)
    dx_at = pointers(dx_ptr, b, p, c, dx_stride_b, dx_stride_p, dx_stride_c)
    for start in range(0, span, BLOCK_P):
        mask = (p + start < P)[:, None] & in_c[None, :]
        h = load_input(
            pixels_on(x_at, start, x_stride_p),
            pixels_on(residual_at, start, residual_stride_p),
            add,
            mask,
            residual_ptr is not None,
        )
        x_hat = (h - mean[None, :]) * rstd[None, :]
        dp = _gradient_before_activation(
            pixels_on(grad_at, start, grad_stride_p), x_hat, gain, offset, mask, SILU
        )
        dx = (dp * gain[None, :] - s1[None, :] - x_hat * s2[None, :]) * rstd[None, :]
        at = pixels_on(dx_at, start, dx_stride_p)
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_silu_bwd_parameters_kernel(
    total_dp_ptr, total_dp_x_ptr, scale_ptr, dweight_ptr, dbias_ptr, B, C, scale_stride_b,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    dweight = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (b < B)[:, None] & in_c[None, :]
        factor = 1.0 + channel_values(
            scale_ptr, b[:, None] * scale_stride_b + c[None, :], mask, 0.0
        )
        at = b[:, None] * C + c[None, :]
        dweight += factor * tl.load(total_dp_x_ptr + at, mask=mask, other=0.0)
        dbias += factor * tl.load(total_dp_ptr + at, mask=mask, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=in_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=in_c)


def group_norm_silu_bwd(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, channel_add, scale and shift; h and p are computed anew."""
    dx = empty_like(x) if wanted[0] else None
    dweight, dbias, dadd, dscale, dshift = (
        value.new_empty(value.shape) if value is not None and want else None
        for value, want in zip((weight, bias, channel_add, scale, shift), wanted[1:], strict=True)
    )
    sizes, device = sizes_of(x, num_groups), device_key(x.device)
    x = evenly_spaced(x)
    grad_y = beside(grad_y, x)
    residual = None if residual is None else beside(residual, x)
    weight, bias = (v if v is None else v.contiguous() for v in (weight, bias))
    (add, add_stride), (scale, scale_stride), (shift, shift_stride) = map(
        rows, (channel_add, scale, shift)
    )
    operands = (grad_y, x, weight, bias, add, residual, scale, shift, mean, rstd)
    row_strides = (add_stride, scale_stride, shift_stride)
    spacing = (*strides(grad_y), *strides(x), *strides(residual))
    totals: list[Tensor | None] = [None, None]
    if dweight is not None or dbias is not None:
        totals = list(x.new_empty((2, *x.shape[:2]), dtype=torch.float32))
    with on_device_of(x):
        tiles = plan.whole("bwd", device, sizes)
        if tiles is not None and x.numel():
            per_sample = -(-num_groups // tiles.groups)
            _group_norm_silu_bwd_kernel[(sizes.batch * per_sample,)](
                *operands, dx, dadd, dscale, dshift, *totals, sizes.channels, sizes.pixels,
                num_groups, per_sample, *row_strides, *spacing, *strides(dx),
                SILU=silu, GROUP_CHANNELS=sizes.group_channels, GROUPS=tiles.groups,
                BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c, num_warps=tiles.num_warps,
                **LAUNCH_OPTIONS,
            )  # fmt: skip
        elif x.numel():
            cut = plan.split("bwd_sums", device, sizes)
            shape = (3 if dadd is not None else 2, sizes.batch, cut.splits, sizes.channels)
            sums = (*x.new_empty(shape, dtype=torch.float32), None)[:3]
            _group_norm_silu_bwd_sums_kernel[(sizes.batch * cut.blocks_c * cut.splits,)](
                *operands, *sums, sizes.channels, sizes.pixels, num_groups, sizes.group_channels,
                cut.span, cut.splits, cut.blocks_c, *row_strides, *spacing, SILU=silu,
                CHANNELS_INNER=sizes.channels_inner, BLOCK_P=cut.block_p, BLOCK_C=cut.block_c,
                num_warps=cut.num_warps, **LAUNCH_OPTIONS,
            )  # fmt: skip
            block_s, block_c = plan.combining(sizes, cut)
            s1, s2 = mean.new_empty((2, *mean.shape))
            _group_norm_silu_bwd_combine_kernel[(sizes.batch * num_groups,)](
                *sums, weight, bias, scale, rstd, s1, s2, dadd, dscale, dshift, *totals,
                sizes.channels, sizes.pixels, num_groups, sizes.group_channels, cut.splits,
                scale_stride, BLOCK_S=block_s, BLOCK_C=block_c, num_warps=4, **LAUNCH_OPTIONS,
            )  # fmt: skip
            if dx is not None:
                cut = plan.split("bwd_apply", device, sizes)
                _group_norm_silu_bwd_apply_kernel[(sizes.batch * cut.blocks_c * cut.splits,)](
                    *operands, s1, s2, dx, sizes.channels, sizes.pixels, num_groups,
                    sizes.group_channels, cut.span, cut.splits, cut.blocks_c, *row_strides,
                    *spacing, *strides(dx), SILU=silu, CHANNELS_INNER=sizes.channels_inner,
                    BLOCK_P=cut.block_p, BLOCK_C=cut.block_c, num_warps=cut.num_warps,
                    **LAUNCH_OPTIONS,
                )  # fmt: skip
        if totals[0] is not None:
            _group_norm_silu_bwd_parameters_kernel[(-(-sizes.channels // 32),)](
                *totals, scale, dweight, dbias, sizes.batch, sizes.channels, scale_stride,
                BLOCK_B=8, BLOCK_C=32, num_warps=4, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return tuple(
        x.new_empty(0) if gradient is None else gradient
        for gradient in (dx, dweight, dbias, dadd, dscale, dshift)
    )
