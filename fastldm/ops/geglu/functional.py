"""`geglu`: checks, dispatch, autograd and documentation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import _checks, _direct, _dispatch, _schema
from fastldm.ops.geglu import reference


def geglu(hidden_states: Tensor) -> Tensor:
    """The gated linear unit of a feed-forward net (2002.05202, equation 6), after its projection.

    With both halves of the last dimension and the normal distribution Φ, exact and not its
    approximation by tanh::

        value, gate = hidden_states.chunk(2, dim=-1)        y = value·gate·Φ(gate)

    Computed in float32 (float64 for float64) and rounded once. Differentiable to any order.

    Args:
        hidden_states: [..., 2·D], floating, any strides; read in place where its rows are evenly
            spaced and their elements neighbours, as in a slice. Any dimension but the last may
            be 0.

    Returns:
        [..., D], contiguous, in the dtype of `hidden_states`.

    Raises:
        ConfigError: `hidden_states` has a shape or dtype that is not accepted.
        BackendUnavailableError: the backend asked for by name cannot serve this call.
    """
    _check(hidden_states)
    backend = _dispatch.choose("geglu", hidden_states)
    if backend == "reference":
        # The plain formula, which autograd differentiates and the compiler fuses.
        return reference.geglu_fwd(hidden_states)
    if _direct.may_call_kernel(hidden_states, backend=backend):
        result: Tensor = _schema.kernel("geglu_fwd", backend)(hidden_states)
    else:
        result = _GEGLU.apply(hidden_states, backend)
    return result


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, backend: str) -> Tensor:
        y: Tensor = _direct.raw("geglu_fwd", backend, hidden_states)(hidden_states)
        ctx.save_for_backward(hidden_states)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad_y,), (hidden_states,) = grads, ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # As a graph of its own, for create_graph=True.
            y = reference.geglu_fwd(hidden_states)
            return (*torch.autograd.grad(y, hidden_states, grad_y, create_graph=True), None)
        return _direct.raw("geglu_bwd", ctx.backend, grad_y, hidden_states)(
            grad_y, hidden_states
        ), None


def _check(hidden_states: Tensor) -> None:
    x = hidden_states
    if x.ndim < 1 or x.shape[-1] < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ConfigError(
            f"hidden_states: got {_checks.describe(x)}; accepted: a floating tensor [..., 2·D]"
        )
