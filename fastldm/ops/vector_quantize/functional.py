"""`vector_quantize`: checks, dispatch, autograd and documentation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import _checks, _direct, _dispatch
from fastldm.ops.vector_quantize import reference


class VectorQuantizeOutput(NamedTuple):
    """What `vector_quantize` gives."""

    z_q: Tensor
    """The chosen codes, in the shape, dtype and layout of z; its gradient passes on to z."""
    indices: Tensor
    """Their indices, int64, the shape of z without the channel dimension."""
    codebook_loss: Tensor
    """mean((sg[z] − e)²), a scalar: pulls the codes to the latents."""
    commitment_loss: Tensor
    """mean((z − sg[e])²), the same value: pulls the latents to their codes."""


class CodebookStatistics(NamedTuple):
    """What `codebook_statistics` gives."""

    counts: Tensor
    """How many latents have each code, int64 [K]."""
    sums: Tensor
    """The sum of the latents of each code, [K, D], float32, or float64 for a float64 z."""


def vector_quantize(z: Tensor, codebook: Tensor, *, channel_dim: int = 1) -> VectorQuantizeOutput:
    """Replace each latent vector by its nearest codebook entry (VQ-VAE, 1711.00937, eq. 1–3).

    The nearest entry is that of the smallest squared distance, computed as a sum of squared
    differences in float32 (float64 where an operand is float64), also under autocast, which has no
    effect here; the lowest index wins a tie. z_q is exactly the entry, rounded to the dtype of z.
    Memory is O(N + K·D) beside the inputs. Differentiable to any order:

    - z gets the gradient of z_q unchanged (straight-through) and that of `commitment_loss`;
    - the codebook gets that of `codebook_loss`, summed over each code in a fixed order.

    The losses carry no weight: VQ-VAE's β, and where CompVis puts it, is the caller's.

    Args:
        z: [B, D, *spatial], or any shape with D at `channel_dim`; floating, any strides.
        codebook: [K, D], K ≥ 1, floating.
        channel_dim: which dimension of `z` holds D; may be negative.

    Returns:
        `VectorQuantizeOutput`; the losses are float32, or float64 where an operand is, and NaN for
        a z without elements, as every mean of nothing.

    Raises:
        ConfigError: an argument has a shape, dtype, device or value that is not accepted.
        NonFiniteLossError: z or the codebook holds NaN (not found while a CUDA graph is captured;
            there such a latent gets index 0 and makes both losses NaN).
        BackendUnavailableError: the backend asked for by name cannot serve this call.
    """
    dim = _check(z, codebook, channel_dim)
    backend = _dispatch.choose("vector_quantize", z, codebook, channel_dim=dim)
    # Traced, the reference's search would become a matrix of N·K distances or an unrolled loop, so
    # it stays behind the raw operator when compiled, too.
    return VectorQuantizeOutput(*_VectorQuantize.apply(z, codebook, dim, backend))


def codebook_statistics(
    z: Tensor, indices: Tensor, num_embeddings: int, *, channel_dim: int = 1
) -> CodebookStatistics:
    """Count and add up the latents of each code: what moving averages of a codebook are made of.

    The counts and sums of VQ-VAE's appendix A.1 (1711.00937). Each sum is taken in a fixed order.
    No gradient passes through.

    Args:
        z: [B, D, *spatial], or any shape with D at `channel_dim`; floating, any strides.
        indices: int64, the shape of `z` without `channel_dim`, values 0 to K − 1, as
            `vector_quantize` gives them.
        num_embeddings: K.
        channel_dim: which dimension of `z` holds D; may be negative.

    Returns:
        `CodebookStatistics`.

    Raises:
        ConfigError: an argument has a shape, dtype or device that is not accepted.
        BackendUnavailableError: the backend asked for by name cannot serve this call.
    """
    dim = _checked_channel_dim(z, channel_dim)
    shape = (*z.shape[:dim], *z.shape[dim + 1 :])
    if indices.dtype != torch.int64 or indices.shape != shape or indices.device != z.device:
        raise ConfigError(
            f"indices: got {_checks.describe(indices)}; "
            f"accepted: torch.int64 of {list(shape)} on {z.device}"
        )
    if num_embeddings < 1:
        raise ConfigError(f"num_embeddings: got {num_embeddings}; accepted: 1 or more")
    backend = _dispatch.choose("codebook_statistics", z, indices, num_embeddings, channel_dim=dim)
    z = z.detach()
    statistics = _direct.raw("vector_quantize_statistics", backend, z, indices)
    return CodebookStatistics(*statistics(z, indices, num_embeddings, dim))


class _VectorQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, codebook: Tensor, channel_dim: int, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z_q, indices, loss = torch.ops.fastldm.vector_quantize_fwd(
            z, codebook, channel_dim, backend=backend
        )
        ctx.save_for_backward(z, codebook, indices)
        ctx.mark_non_differentiable(indices)
        ctx.channel_dim, ctx.backend = channel_dim, backend
        return z_q, indices, loss, loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_z_q, _, grad_codebook_loss, grad_commitment_loss = grads
        arguments = (
            grad_z_q, grad_codebook_loss, grad_commitment_loss, *ctx.saved_tensors, ctx.channel_dim
        )  # fmt: skip
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # For create_graph=True: the formula is differentiable, a kernel is not.
            grad_z, grad_codebook = reference.vector_quantize_bwd(*arguments)
        else:
            grad_z, grad_codebook = torch.ops.fastldm.vector_quantize_bwd(
                *arguments, backend=ctx.backend
            )
        need_z, need_codebook, *_ = ctx.needs_input_grad
        return grad_z if need_z else None, grad_codebook if need_codebook else None, None, None


def _check(z: Tensor, codebook: Tensor, channel_dim: int) -> int:
    """The channel dimension counted from the front; ConfigError for what is not accepted."""
    if codebook.ndim != 2 or 0 in codebook.shape or not codebook.is_floating_point():
        raise ConfigError(
            f"codebook: got {_checks.describe(codebook)}; "
            "accepted: a floating tensor [K, D] with K and D of 1 or more"
        )
    dim = _checked_channel_dim(z, channel_dim)
    if z.device != codebook.device:
        raise ConfigError(
            f"z: got {_checks.describe(z)}; accepted: a floating tensor on {codebook.device}"
        )
    if z.shape[dim] != codebook.shape[1]:
        raise ConfigError(
            f"z: got {z.shape[dim]} channels in dimension {dim}; "
            f"accepted: {codebook.shape[1]}, the width D of the codebook's entries"
        )
    return dim


def _checked_channel_dim(z: Tensor, channel_dim: int) -> int:
    """The channel dimension counted from the front."""
    if z.ndim == 0 or not z.is_floating_point():
        raise ConfigError(
            f"z: got {_checks.describe(z)}; accepted: a floating tensor [B, D, *spatial]"
        )
    if not -z.ndim <= channel_dim < z.ndim:
        raise ConfigError(
            f"channel_dim: got {channel_dim}; accepted: -{z.ndim} to {z.ndim - 1} for this z"
        )
    return channel_dim % z.ndim
