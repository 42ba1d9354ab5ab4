"""The specification of GroupNorm + SiLU, in plain torch.

With h = x + channel_add + residual, and the mean μ and variance σ² of h over each group::

    x̂ = (h − μ)/√(σ² + eps)        n = x̂·weight + bias
    p = n·(1 + scale) + shift      y = p·sigmoid(p)   or   y = p

Computed in float32 (float64 for float64) and rounded once, at the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops._layout import has_channels_innermost, per_channel, with_layout_of
from fastldm.ops._schema import compute_dtype


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
    """y in the layout of x; μ and 1/√(σ² + eps), [B, num_groups]. y is differentiable."""
    h = _normalised_input(x, channel_add, residual)
    n, mean, rstd = _normalise(h, num_groups, weight, bias, eps)
    p = _modulate(n, scale, shift)
    return with_layout_of((F.silu(p) if silu else p).to(x.dtype), x), mean, rstd


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
    """Gradients of x, weight, bias, channel_add, scale and shift; n and p are computed anew."""
    need_x, need_weight, need_bias, need_add, need_scale, _ = wanted
    h = _normalised_input(x, channel_add, residual)
    g = grad_y.to(h.dtype)
    n = h
    if silu or need_scale:
        n, _, _ = _normalise(h, num_groups, weight, bias, eps)
    if silu:
        g = torch.ops.aten.silu_backward(g, _modulate(n, scale, shift))
    dscale, dshift = (_over_pixels(g * n) if need_scale else None), _over_pixels(g)
    dn = g if scale is None else g * per_channel(1 + scale.to(h.dtype), h)
    dh, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        with_layout_of(dn, h), h, mean, rstd, _to(weight, h), h.shape[0], h.shape[1], _pixels(h),
        num_groups, [need_x or need_add, need_weight, need_bias],
    )  # fmt: skip
    gradients = (
        (x, with_layout_of(dh, x) if need_x else None),
        (weight, dweight),
        (bias, dbias),
        (channel_add, _over_pixels(dh) if need_add else None),
        (scale, dscale),
        (shift, dshift),
    )
    return tuple(
        gradient.to(like.dtype)
        if want and like is not None and gradient is not None
        else x.new_empty(0)
        for want, (like, gradient) in zip(wanted, gradients, strict=True)
    )


def _normalise(
    h: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """n, μ and 1/√(σ² + eps)."""
    centre = None
    if has_channels_innermost(h):
        # For this layout ATen takes the variance as E[h²] − E[h]², which a mean of 0 makes exact.
        centre = _group_means(_over_pixels(h) / _pixels(h), num_groups).detach()
        h = h - per_channel(_to_channels(centre, h), h)
    n, mean, rstd = torch.native_group_norm(
        h, _to(weight, h), _to(bias, h), h.shape[0], h.shape[1], _pixels(h), num_groups, eps
    )
    return n, (mean if centre is None else mean + centre), rstd


def _modulate(n: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """p, from n."""
    if scale is not None:
        n = n * per_channel(1 + scale.to(n.dtype), n)
    if shift is not None:
        n = n + per_channel(shift.to(n.dtype), n)
    return n


def _normalised_input(x: Tensor, channel_add: Tensor | None, residual: Tensor | None) -> Tensor:
    h = x.to(compute_dtype(x))
    if channel_add is not None:
        h = h + per_channel(channel_add.to(h.dtype), h)
    if residual is not None:
        h = h + residual.to(h.dtype)
    # ATen's kernels take channels_last on the CPU alone, and not the strides of a slice.
    if h.device.type == "cpu" and h.ndim in (4, 5):
        return with_layout_of(h, h)
    return h.contiguous()


def _to(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like.dtype)


def _pixels(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _over_pixels(x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, C], a sum."""
    return x.flatten(2).sum(2) if x.ndim > 2 else x


def _group_means(values: Tensor, num_groups: int) -> Tensor:
    """[B, C] → [B, num_groups]."""
    return values.unflatten(1, (num_groups, values.shape[1] // num_groups)).mean(2)


def _to_channels(values: Tensor, like: Tensor) -> Tensor:
    """[B, num_groups] → [B, C], each value repeated over its group."""
    return values.repeat_interleave(like.shape[1] // values.shape[1], dim=1)
