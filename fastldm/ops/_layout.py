"""Memory layouts of [B, C, *spatial] tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def has_channels_innermost(x: Tensor) -> bool:
    """Whether neighbours in memory are neighbours in C: channels_last, of any rank, or sliced."""
    return x.ndim > 2 and x.stride(1) == 1 and not x.is_contiguous()


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor in the shape and layout of `x` ([B, C, *spatial])."""
    if not has_channels_innermost(x):
        return x.new_empty(x.shape, dtype=dtype)
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=dtype).movedim(-1, 1)


def with_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """`y`, dense in the layout of `x`; copied only where it is in another one."""
    if has_channels_innermost(x):
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous()


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """View [C] or [B, C] so that it broadcasts against `like`, [B, C, *spatial]."""
    return values.reshape(*values.shape, *(1,) * (like.ndim - 2))
