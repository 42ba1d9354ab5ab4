"""The specification of the nearest-codebook lookup, in plain torch.

The distance is Σ_d (z_d − e_d)², its terms added in the order of d and each operation rounded to
float32 (float64 where an operand is float64); the lowest index wins a tie. The expanded form
z² − 2z·e + e² is not used: its cancellation chooses wrong codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import NonFiniteLossError
from fastldm.ops._schema import compute_dtype

NAN_MESSAGE = "vector_quantize: {} holds NaN, so there is neither a nearest code nor a loss"
_DISTANCES_AT_ONCE = 2**20


def vector_quantize_fwd(
    z: Tensor, codebook: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen codes in the shape, dtype and strides of z, their indices, mean squared distance."""
    dtype = compute_dtype(z, codebook)
    table = codebook.to(dtype)
    latents = z.movedim(channel_dim, -1)
    # Inside a captured CUDA graph nothing can be read back; there NaN gets index 0 and a NaN loss.
    if not (z.is_cuda and torch.cuda.is_current_stream_capturing()):
        for name, value in (("z", z), ("codebook", codebook)):
            if value.isnan().any():
                raise NonFiniteLossError(NAN_MESSAGE.format(name))
    indices = _nearest(latents.to(dtype).reshape(-1, table.shape[1]), table)
    indices = indices.reshape(latents.shape[:-1])
    chosen = F.embedding(indices, table)
    loss = (latents.to(dtype) - chosen).square().mean()
    z_q = torch.empty_like(z)
    z_q.copy_(chosen.movedim(-1, channel_dim))
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
    """Gradients of z (straight-through, and commitment) and of the codebook; differentiable."""
    dtype = compute_dtype(z, codebook)
    latents = z.movedim(channel_dim, -1).to(dtype)
    difference = latents - F.embedding(indices, codebook.to(dtype))
    toward = difference * (2 / max(z.numel(), 1))
    grad_latents = grad_z_q.movedim(channel_dim, -1).to(dtype) + grad_commitment_loss * toward
    # It adds up the rows of each code in a fixed order on every device, as index_add_ does not.
    grad_codebook = torch.ops.aten.embedding_dense_backward(
        -grad_codebook_loss * toward, indices, codebook.shape[0], -1, False
    )
    grad_z = torch.empty_like(z).copy_(grad_latents.movedim(-1, channel_dim))
    return grad_z, grad_codebook.to(codebook.dtype)


def vector_quantize_statistics(
    z: Tensor, indices: Tensor, num_embeddings: int, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """How many latents have each code, [K], and their sums, [K, D]."""
    rows = z.movedim(channel_dim, -1).to(compute_dtype(z))
    flat = indices.flatten()
    counts = flat.new_zeros(num_embeddings).index_add_(0, flat, torch.ones_like(flat))
    sums = torch.ops.aten.embedding_dense_backward(rows, indices, num_embeddings, -1, False)
    return counts, sums


def _nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each row, [N, D] → [N], in memory that does not grow with N."""
    indices = rows.new_empty(rows.shape[0], dtype=torch.int64)
    step = max(_DISTANCES_AT_ONCE // codebook.shape[0], 1)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        distances = part.new_zeros(part.shape[0], codebook.shape[0])
        for d in range(codebook.shape[1]):
            difference = part[:, d, None] - codebook[:, d]
            distances += difference.mul_(difference)
        # argmin may give any of several minima; max of a bool gives the first.
        at_minimum = distances == distances.amin(1, keepdim=True)
        indices[start : start + step] = at_minimum.to(torch.uint8).argmax(1)
    return indices
