"""The C++ backend of GroupNorm + SiLU; its code is in csrc/group_norm_silu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastldm.ops._extension import extension


def group_norm_silu(x: Tensor, *arguments: Any) -> Tensor | None:
    """The whole operator for eager tensors, with its backward pass; never while a graph is traced.

    Returns:
        None where somebody listens to operations on these tensors: see `fastldm.ops._direct`.

    Raises:
        RuntimeError, TypeError: an argument is one that the functional does not accept.
    """
    result: Tensor | None = extension().group_norm_silu(x, *arguments)
    return result


def group_norm_silu_fwd(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's; x is read twice and y written once."""
    result: tuple[Tensor, Tensor, Tensor] = extension().group_norm_silu_fwd(x, *arguments)
    return result


def group_norm_silu_bwd(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """As the reference's; the sums over pixels and samples have one order."""
    gradients: tuple[Tensor, ...] = extension().group_norm_silu_bwd(grad_y, x, *arguments)
    return gradients
