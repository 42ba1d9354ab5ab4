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
    centre = None
    if has_channels_innermost(h):
        # For this layout ATen takes the variance as E[h²] − E[h]², which a mean of 0 makes exact.
        centre = _group_means(_over_pixels(h) / _pixels(h), num_groups).detach()
        h = h - per_channel(_to_channels(centre, h), h)
    y, mean, rstd = torch.native_group_norm(
        h, _to(weight, h), _to(bias, h), h.shape[0], h.shape[1], _pixels(h), num_groups, eps
    )
    if centre is not None:
        mean = mean + centre
    if scale is not None:
        y = y * per_channel(1 + scale.to(h.dtype), h)
    if shift is not None:
        y = y + per_channel(shift.to(h.dtype), h)
    if silu:
        y = F.silu(y)
    return with_layout_of(y.to(x.dtype), x), mean, rstd


def group_norm_silu_bwd(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, channel_add, scale and shift, from the saved statistics.

    With a = weight·(1 + scale), g = ∂L/∂p, and sums over the pixels of a channel::

        s₀ = Σ g      s₁ = Σ g·x̂
        ∂L/∂h = (a·g − mean_group(a·g) − x̂·mean_group(a·g·x̂))/√(σ² + eps)
    """
    h = _normalised_input(x, channel_add, residual)
    centred = h - per_channel(_to_channels(mean, h), h)
    inverse = _to_channels(rstd, h)
    gain = 1 if scale is None else 1 + scale.to(h.dtype)
    w = h.new_ones(h.shape[1]) if weight is None else weight.to(h.dtype)
    b = h.new_zeros(h.shape[1]) if bias is None else bias.to(h.dtype)
    a = (w * gain).expand(h.shape[:2])
    g = grad_y.to(h.dtype)
    if silu:
        offset = b * gain if shift is None else b * gain + shift.to(h.dtype)
        p = centred * per_channel(inverse * a, h) + per_channel(offset, h)
        sigmoid = p.sigmoid()
        g = g * sigmoid * (1 + p * (1 - sigmoid))
    s0 = _over_pixels(g)
    s1 = _over_pixels(g * centred) * inverse
    share = 1 / _pixels(h)
    m0 = _to_channels(_group_means(a * s0 * share, num_groups), h)
    m1 = _to_channels(_group_means(a * s1 * share, num_groups), h)
    dh = (
        g * per_channel(inverse * a, h)
        - centred * per_channel(inverse.square() * m1, h)
        - per_channel(inverse * m0, h)
    )
    gradients = (
        (x, lambda: with_layout_of(dh.to(x.dtype), x)),
        (weight, lambda: (s1 * gain).sum(0)),
        (bias, lambda: (s0 * gain).sum(0)),
        (channel_add, lambda: _over_pixels(dh)),
        (scale, lambda: s1 * w + s0 * b),
        (shift, lambda: s0),
    )
    return tuple(
        compute().to(like.dtype) if want and like is not None else x.new_empty(0)
        for want, (like, compute) in zip(wanted, gradients, strict=True)
    )


def _normalised_input(x: Tensor, channel_add: Tensor | None, residual: Tensor | None) -> Tensor:
    h = x.to(compute_dtype(x))
    if channel_add is not None:
        h = h + per_channel(channel_add.to(h.dtype), h)
    if residual is not None:
        h = h + residual.to(h.dtype)
    return h


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
