"""`cross_attention`: checks, dispatch, autograd and documentation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import _checks, _direct, _dispatch, _schema
from fastldm.ops.cross_attention import reference


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention (1706.03762, eq. 1) from many queries to few keys, as from pixels to a caption.

    ``softmax(scale·q·kᵀ)·v`` for each sample and head. Sums and the softmax are in float32
    (float64 for float64). Under autocast, operands that are not float64 are cast to its dtype, as
    by torch's scaled_dot_product_attention. Differentiable in q, k and v. The reference backend is
    that function, whose fused kernels refuse second derivatives; they are to be had inside
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        q: [B, Lq, H, D], floating, any strides.
        k, v: [B, Lk, H, D], dtype of `q`, Lk ≥ 1.
        scale: of the scores, D^−½ if None.
        key_mask: [B, Lk] bool, True = attend. A sample without any key to attend to gives 0.

    Returns:
        [B, Lq, H, D], contiguous.

    Raises:
        ConfigError: an argument has a shape, dtype or device that is not accepted.
        BackendUnavailableError: the backend asked for by name cannot serve this call.
    """
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    _check(q, k, v, key_mask)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = _dispatch.choose("cross_attention", q, k, v, key_mask=key_mask)
    if backend == "reference":
        # Plain torch, not the raw operator: scaled_dot_product_attention has fused kernels and a
        # fused backward of its own, which the compiler knows, too.
        return reference.cross_attention_fwd(q, k, v, factor, key_mask)
    result: Tensor
    if _direct.may_call_kernel(q, k, v, key_mask, backend=backend):
        result = _schema.kernel("cross_attention_fwd", backend)(q, k, v, factor, key_mask)
    else:
        result = _CrossAttention.apply(q, k, v, factor, key_mask, backend)
    return result


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        key_mask: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, key_mask)
        ctx.scale, ctx.backend = scale, backend
        result: Tensor = _direct.raw("cross_attention_fwd", backend, q, k, v, key_mask)(
            q, k, v, scale, key_mask
        )
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, key_mask = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # For create_graph=True: the formula is differentiable, a kernel is not.
            compute = reference.cross_attention_bwd
        else:
            compute = _direct.raw("cross_attention_bwd", ctx.backend, grad, q, k, v, key_mask)
        found = compute(grad, q, k, v, ctx.scale, key_mask, wanted)
        gradients = (
            gradient if want else None for gradient, want in zip(found, wanted, strict=True)
        )
        return (*gradients, None, None, None)


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    if q.ndim != 4 or not q.is_floating_point():
        raise ConfigError(
            f"q: got {_checks.describe(q)}; accepted: a floating tensor [B, Lq, H, D]"
        )
    batch, _, heads, width = q.shape
    for name, value in (("k", k), ("v", v)):
        if value.ndim != 4 or value.shape[1] == 0:
            raise ConfigError(
                f"{name}: got {_checks.describe(value)}; accepted: [B, Lk, H, D], Lk ≥ 1"
            )
        _checks.shape_and_device(name, value, (batch, k.shape[1], heads, width), "[B, Lk, H, D]", q)
        if value.dtype != q.dtype:
            raise ConfigError(f"{name}: got {value.dtype}; accepted: {q.dtype}, the dtype of q")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, k.shape[1]):
        raise ConfigError(
            f"key_mask: got {_checks.describe(key_mask)}; "
            f"accepted: torch.bool of shape {[batch, k.shape[1]]} ([B, Lk]), True = attend"
        )
    if key_mask.device != q.device:
        raise ConfigError(f"key_mask: got a tensor on {key_mask.device}; accepted: {q.device}")
