"""The C++ backend of cross-attention; its code is in csrc/cross_attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastldm.ops._extension import extension


def cross_attention_fwd(q: Tensor, *arguments: Any) -> Tensor:
    """As the reference's, in float32; keys that a mask leaves out are not read."""
    result: Tensor = extension().cross_attention_fwd(q, *arguments)
    return result


def cross_attention_bwd(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """As the reference's; the sums over the queries have one order."""
    gradients: tuple[Tensor, ...] = extension().cross_attention_bwd(grad, *arguments)
    return gradients
