"""The specification of GEGLU (2002.05202), in plain torch.

With the normal distribution Φ, of each half of the last dimension::

    value, gate = hidden_states        y = value·gate·Φ(gate)

Computed in float32 (float64 for float64) and rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops._schema import compute_dtype


def geglu_fwd(hidden_states: Tensor) -> Tensor:
    """[..., 2·D] → [..., D], contiguous; differentiable."""
    value, gate = hidden_states.to(compute_dtype(hidden_states)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(hidden_states.dtype).contiguous()


def geglu_bwd(grad_y: Tensor, hidden_states: Tensor) -> Tensor:
    """The gradient of hidden_states, contiguous."""
    dtype = compute_dtype(hidden_states)
    g = grad_y.to(dtype)
    value, gate = hidden_states.to(dtype).chunk(2, dim=-1)
    gradients = g * F.gelu(gate), torch.ops.aten.gelu_backward(g * value, gate)
    return torch.cat(gradients, dim=-1).to(hidden_states.dtype).contiguous()
