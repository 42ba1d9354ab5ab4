"""The C++ and CUDA backend of the nearest-codebook lookup; its code is in csrc/vector_quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.errors import NonFiniteLossError
from fastldm.ops._extension import extension
from fastldm.ops._schema import compute_dtype
from fastldm.ops.vector_quantize.reference import NAN_MESSAGE


def vector_quantize_fwd(
    z: Tensor, codebook: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's; z is read and z_q written in place, whatever the strides."""
    table = codebook.to(compute_dtype(z, codebook)).contiguous()
    if not z.is_cuda:
        z_q, indices, loss, nan_in = extension().vector_quantize_fwd(z, table, channel_dim)
        if nan_in:
            raise NonFiniteLossError(NAN_MESSAGE.format(nan_in))
        return z_q, indices, loss
    z_q, indices, loss, holds_nan = extension().vector_quantize_fwd_cuda(z, table, channel_dim)
    # Inside a captured CUDA graph nothing can be read back; there NaN gets index 0 and a NaN loss.
    if not torch.cuda.is_current_stream_capturing():
        for name, bad in zip(("z", "codebook"), holds_nan.tolist(), strict=True):
            if bad:
                raise NonFiniteLossError(NAN_MESSAGE.format(name))
    return z_q, indices, loss


def vector_quantize_bwd(
    grad_z_q: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """As the reference's; the sum of each code is taken in a fixed order."""
    table = codebook.to(compute_dtype(z, codebook)).contiguous()
    if z.is_cuda:
        grad_z, grad_codebook = extension().vector_quantize_bwd_cuda(
            grad_z_q, grad_codebook_loss, grad_commitment_loss, z, table, indices, channel_dim
        )
    else:
        grad_z, grad_codebook = extension().vector_quantize_bwd(
            grad_z_q,
            float(grad_codebook_loss),
            float(grad_commitment_loss),
            z,
            table,
            indices,
            channel_dim,
        )
    return grad_z, grad_codebook.to(codebook.dtype)


def vector_quantize_statistics(
    z: Tensor, indices: Tensor, num_embeddings: int, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """As the reference's; each sum is taken in a fixed order, on the CPU in float64."""
    module = extension()
    statistics = module.codebook_statistics_cuda if z.is_cuda else module.codebook_statistics
    counts, sums = statistics(z, indices, num_embeddings, channel_dim)
    return counts, sums
