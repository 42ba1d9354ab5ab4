"""The C++ backend of GEGLU; its code is in csrc/geglu."""

from __future__ import annotations

from torch import Tensor

from fastldm.ops._extension import extension


def geglu_fwd(hidden_states: Tensor) -> Tensor:
    """As the reference's, in one pass."""
    result: Tensor = extension().geglu_fwd(hidden_states)
    return result


def geglu_bwd(grad_y: Tensor, hidden_states: Tensor) -> Tensor:
    """As the reference's, in one pass."""
    gradient: Tensor = extension().geglu_bwd(grad_y, hidden_states)
    return gradient
