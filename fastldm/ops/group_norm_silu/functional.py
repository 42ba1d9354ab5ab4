"""`group_norm_silu`: checks, dispatch, autograd and documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import _checks, _direct, _dispatch, _schema
from fastldm.ops.group_norm_silu import cpp, reference


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = "silu",
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Group normalisation (1803.08494) and SiLU (1606.08415), with what stands around them.

    With GN the normalisation of each sample over the channels of a group and all pixels, times
    `weight` plus `bias`::

        y = silu(GN(x + channel_add + residual)·(1 + scale) + shift)

    `channel_add` is where a residual block adds its time embedding; `scale` and `shift` are AdaGN
    (2105.05233, section 3). Statistics are in float32 (float64 for float64), also under autocast,
    which has no effect here. Differentiable to any order in every tensor.

    Args:
        x: [B, C, *spatial], floating, any layout; B may be 0.
        num_groups: divides C.
        weight, bias: [C], any floating dtype; 1 and 0 if None.
        eps: added to the variance.
        activation: ``"silu"``, or None for the identity.
        channel_add: [B, C], any floating dtype.
        residual: shape and dtype of `x`.
        scale, shift: [B, C], any floating dtype.

    Returns:
        Shape, dtype and layout of `x`: channels_last stays channels_last, and an `x` that is a
        slice of a larger tensor gives a dense result.

    Raises:
        ConfigError: an argument has a shape, dtype, device or value that is not accepted.
        BackendUnavailableError: the backend asked for by name cannot serve this call.
    """
    operands = (weight, bias, channel_add, residual, scale, shift)
    silu = activation == "silu"
    if (
        (silu or activation is None)
        and not torch.compiler.is_compiling()
        and _dispatch.prefers_cpp(x)
    ):
        # The kernel refuses what the checks refuse. They cost more time than a small tensor, and
        # are to say what is wrong.
        try:
            y = cpp.group_norm_silu(
                x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift
            )
        except (RuntimeError, TypeError):
            y = None
        if y is not None:
            return y
    _check(x, num_groups, weight, bias, activation, channel_add, residual, scale, shift)
    backend = _dispatch.choose("group_norm_silu", x, num_groups)
    if backend == "reference":
        # The plain formula, not the raw operator: torch's own autograd of it is faster, eager, than
        # a second trip through Python, and the compiler fuses it with the convolutions' biases and
        # the additions around it, where a raw operator would be a black box.
        return _formula(x, *operands, num_groups=num_groups, eps=eps, silu=silu)
    result: Tensor
    if _direct.may_call_kernel(x, *operands, backend=backend):
        result, _, _ = _schema.kernel("group_norm_silu_fwd", backend)(
            x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift
        )
    else:
        result = _GroupNormSiLU.apply(x, *operands, num_groups, eps, silu, backend)
    return result


def _formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    y, _, _ = reference.group_norm_silu_fwd(
        x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift
    )
    return y


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        channel_add: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        num_groups: int,
        eps: float,
        silu: bool,
        backend: str,
    ) -> Tensor:
        operands = (x, weight, bias, channel_add, residual, scale, shift)
        y, mean, rstd = _direct.raw("group_norm_silu_fwd", backend, *operands)(
            x, num_groups, weight, bias, eps, silu, channel_add, residual, scale, shift
        )
        ctx.save_for_backward(*operands, mean, rstd)
        ctx.num_groups, ctx.eps, ctx.silu, ctx.backend = num_groups, eps, silu, backend
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        *operands, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(operands)]
        found = gradients(
            operands, mean, rstd, needs, grad_y, ctx.num_groups, ctx.eps, ctx.silu, ctx.backend
        )
        return (*found, *(None,) * 4)


def gradients(
    operands: Sequence[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
    grad_y: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """The gradient of each operand that needs one: the backward pass, here and in C++."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_gradients(operands, needs, grad_y, num_groups, eps, silu)
    x, weight, bias, channel_add, residual, scale, shift = operands
    need_x, need_weight, need_bias, need_add, need_residual, need_scale, need_shift = needs
    wanted = [need_x or need_residual, need_weight, need_bias, need_add, need_scale, need_shift]
    found = _direct.raw("group_norm_silu_bwd", backend, grad_y, *operands)(
        grad_y, x, mean, rstd, num_groups, weight, bias, eps, silu, channel_add, residual, scale,
        shift, wanted,
    )  # fmt: skip
    dx, dweight, dbias, dadd, dscale, dshift = (
        gradient if want else None for gradient, want in zip(found, wanted, strict=True)
    )
    return (
        dx if need_x else None, dweight, dbias, dadd, dx if need_residual else None, dscale, dshift
    )  # fmt: skip


def _differentiable_gradients(
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_y: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph of their own, for ``create_graph=True``."""
    # A view each, so that one tensor given as two arguments has two gradients.
    views = [value if value is None else value.view_as(value) for value in operands]
    y = _formula(*views, num_groups=num_groups, eps=eps, silu=silu)  # type: ignore[arg-type]
    wanted = [view for view, need in zip(views, needs, strict=True) if need and view is not None]
    found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if x.ndim < 2 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ConfigError(
            f"x: got {_checks.describe(x)}; accepted: a floating tensor [B, C, *spatial] "
            "with at least one channel and one pixel"
        )
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ConfigError(f"num_groups: got {num_groups}; accepted: a divisor of {channels}, C")
    if activation not in ("silu", None):
        raise ConfigError(f"activation: got {activation!r}; accepted: 'silu' or None")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.shape_and_device(name, value, (channels,), "[C]", x)
    for name, value in (("channel_add", channel_add), ("scale", scale), ("shift", shift)):
        if value is not None:
            _checks.shape_and_device(name, value, (batch, channels), "[B, C]", x)
    if residual is None:
        return
    _checks.shape_and_device("residual", residual, tuple(x.shape), "the shape of x", x)
    if residual.dtype != x.dtype:
        raise ConfigError(f"residual: got {residual.dtype}; accepted: {x.dtype}, the dtype of x")
