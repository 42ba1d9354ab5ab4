"""The codebook of a VQ first stage: lookup, its two ways to learn, and the revival of dead codes.

A codebook learns either by the gradient of the codebook loss (van den Oord et al., 2017, eq. 3,
https://arxiv.org/abs/1711.00937) or by exponential moving averages of the latents assigned to each
code (their appendix A.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError
from fastldm.modules.codebook_remap import (
    UnknownIndex,
    check_unknown_index,
    checked_used,
    remap_to_used,
    unmap_to_all,
)
from fastldm.outputs import BaseOutput

_USAGE_DECAY = 0.99
_SMOOTHING = 1e-5
_KMEANS_ITERATIONS = 10


@dataclass
class VectorQuantizerOutput(BaseOutput):
    """What a lookup gives; scalars are float32 (float64 for float64 latents).

    Attributes:
        z_q: the chosen codes, shape and dtype of z, with z's gradient (straight-through).
        indices: int64, shape of z without its channels; positions in `used` where the codebook is
            remapped.
        codebook_loss: mean((sg[z] − e)²), moves the codes.
        commitment_loss: mean((z − sg[e])²), moves the latents; unweighted.
        perplexity: exp of the entropy of the codes chosen in this batch, 1…K.
        usage: the share of the K codes chosen at least once in this batch.
    """

    z_q: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    perplexity: Tensor
    usage: Tensor


class VectorQuantizer(nn.Module):
    """Nearest code of each latent, and the codes.

    In training mode with gradients enabled, the moving averages are updated by every forward
    pass, over all processes of ``torch.distributed`` where it is initialised.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, channels of a code.
        ema_decay: decay of the moving averages, in (0, 1); None: the codes learn by gradient.
        dead_code_threshold: a code whose moving average of uses a batch falls below it is
            replaced by a random latent of the batch; None: never.
        initialization: "uniform" in ±1/K, or "data": k-means of the first training batch.
        used: the codes that indices count, [n], taming's ``remap`` (the content of its file): index
            i then stands for the code ``used[i]``. The lookup still has all K codes.
        unknown_index: index of the other codes: "random", "extra" (n) or a number.

    Attributes:
        num_indices: how many values indices have: K, or n, or n + 1 with "extra".

    Raises:
        ConfigError: an argument is out of range.
    """

    ema_counts: Tensor
    ema_sums: Tensor
    data_initialized: Tensor
    used: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        ema_decay: float | None = None,
        dead_code_threshold: float | None = None,
        initialization: str = "uniform",
        used: Tensor | Sequence[int] | None = None,
        unknown_index: UnknownIndex = "random",
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ConfigError(
                "num_vq_embeddings, vq_embed_dim: expected positive numbers, "
                f"got {num_embeddings} and {embedding_dim}"
            )
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ConfigError(f"codebook_ema_decay: expected None or (0, 1), got {ema_decay}")
        if dead_code_threshold is not None and dead_code_threshold <= 0.0:
            raise ConfigError(
                "dead_code_threshold: expected None or a positive number, "
                f"got {dead_code_threshold}"
            )
        if initialization not in ("uniform", "data"):
            raise ConfigError(
                f"codebook_initialization: expected 'uniform' or 'data', got {initialization!r}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.ema_decay = ema_decay
        self.dead_code_threshold = dead_code_threshold
        self.initialization = initialization

        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_embeddings, 1.0 / num_embeddings)
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_sums", self.embedding.weight.detach().clone())
        if ema_decay is not None or dead_code_threshold is not None:
            self.register_buffer("ema_counts", torch.ones(num_embeddings))
        if initialization == "data":
            self.register_buffer("data_initialized", torch.zeros((), dtype=torch.bool))
        check_unknown_index(unknown_index)
        self.unknown_index = unknown_index
        codes = None if used is None else checked_used(used, num_embeddings)
        self.register_buffer("used", codes)

    @property
    def num_indices(self) -> int:
        """How many values indices have."""
        if self.used is None:
            return self.num_embeddings
        return len(self.used) + (self.unknown_index == "extra")

    def forward(self, z: Tensor) -> VectorQuantizerOutput:
        """Quantise z, [B, D, *spatial]; computed in float32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            latents = z if z.dtype == torch.float64 else z.float()
            learning = self.training and torch.is_grad_enabled()
            if learning and self.initialization == "data" and not self.data_initialized:
                self._initialize_from(_rows(latents))
            codebook = self.embedding.weight.to(latents.dtype)
            updating = learning and (
                self.ema_decay is not None or self.dead_code_threshold is not None
            )
            if updating:
                # The update below writes to the weight that the backward pass may still need.
                codebook = codebook.clone()
            found = ops.vector_quantize(latents, codebook)
            if updating:
                counts, sums = ops.codebook_statistics(latents, found.indices, self.num_embeddings)
                _sum_over_processes(counts)
                self._update(_rows(latents), counts, sums)
            else:
                counts = _count(found.indices, self.num_embeddings)
            perplexity, usage = _statistics(counts, latents.dtype)
            return VectorQuantizerOutput(
                found.z_q.to(z.dtype),
                self.remap_to_used(found.indices),
                found.codebook_loss,
                found.commitment_loss,
                perplexity,
                usage,
            )

    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Codes of `indices`: [..., D], or [B, D, H, W] where `shape` is (B, H, W, D)."""
        codes = self.embedding(self.unmap_to_all(indices))
        if shape is None:
            return codes
        return codes.view(shape).permute(0, 3, 1, 2).contiguous()

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Positions of codes among those used, or the codes where none are listed."""
        if self.used is None:
            return indices
        return remap_to_used(indices, self.used, self.unknown_index)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Codes of positions among those used: the way back."""
        return indices if self.used is None else unmap_to_all(indices, self.used)

    @torch.no_grad()
    def _update(self, rows: Tensor, counts: Tensor, sums: Tensor) -> None:
        """Move the averages towards this batch, then replace dead codes.

        Args:
            rows: this process's latents, [N, D].
            counts: uses of each code over all processes, [K].
            sums: of this process's latents of each code, [K, D].
        """
        decay = _USAGE_DECAY if self.ema_decay is None else self.ema_decay
        self.ema_counts.lerp_(counts.to(self.ema_counts.dtype), 1.0 - decay)
        if self.ema_decay is not None:
            _sum_over_processes(sums)
            self.ema_sums.lerp_(sums.to(self.ema_sums.dtype), 1.0 - decay)
            total = self.ema_counts.sum()
            smoothed = (
                (self.ema_counts + _SMOOTHING) / (total + self.num_embeddings * _SMOOTHING) * total
            )
            self.embedding.weight.copy_(self.ema_sums / smoothed[:, None])
        if self.dead_code_threshold is not None and len(rows):
            self._revive(rows, self.dead_code_threshold)

    def _revive(self, rows: Tensor, threshold: float) -> None:
        dead = self.ema_counts < threshold
        candidates = self._random_rows(rows).to(self.embedding.weight.dtype)
        weight = torch.where(dead[:, None], candidates, self.embedding.weight)
        self.embedding.weight.copy_(weight)
        # Twice the threshold leaves a new code ln 2 / (1 − decay) batches to be chosen.
        self.ema_counts.masked_fill_(dead, 2.0 * threshold)
        if self.ema_decay is not None:
            revived = self.embedding.weight * self.ema_counts[:, None]
            self.ema_sums.copy_(torch.where(dead[:, None], revived, self.ema_sums))

    def _random_rows(self, rows: Tensor) -> Tensor:
        """K latents drawn from the first process's batch, the same on every process."""
        if len(rows) >= self.num_embeddings:
            choice = torch.randperm(len(rows), device=rows.device)[: self.num_embeddings]
        else:
            choice = torch.randint(len(rows), (self.num_embeddings,), device=rows.device)
        chosen = rows[choice].contiguous()
        if _is_distributed():
            dist.broadcast(chosen, src=0)
        return chosen

    @torch.no_grad()
    def _initialize_from(self, rows: Tensor) -> None:
        """k-means (Lloyd's iterations) of the first batch; a code without latents stays."""
        if not len(rows):
            return
        centres = self._random_rows(rows)
        for _ in range(_KMEANS_ITERATIONS):
            indices = ops.vector_quantize(rows, centres).indices
            counts, sums = ops.codebook_statistics(rows, indices, self.num_embeddings)
            _sum_over_processes(counts)
            _sum_over_processes(sums)
            means = sums / counts.clamp(min=1)[:, None].to(sums.dtype)
            centres = torch.where(counts[:, None] > 0, means, centres)
        self.embedding.weight.copy_(centres)
        if self.ema_decay is not None:
            self.ema_sums.copy_(self.embedding.weight * self.ema_counts[:, None])
        self.data_initialized.fill_(True)


def _rows(z: Tensor) -> Tensor:
    """[B, D, *spatial] → [B · spatial, D], without a gradient."""
    return z.detach().movedim(1, -1).flatten(0, -2)


def _count(indices: Tensor, num_embeddings: int) -> Tensor:
    flat = indices.flatten()
    counts = torch.zeros(num_embeddings, dtype=torch.int64, device=flat.device)
    return counts.index_add_(0, flat, torch.ones_like(flat))


def _statistics(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Perplexity and used share of a histogram of codes."""
    probabilities = counts.to(dtype) / counts.sum().clamp(min=1)
    entropy = torch.special.entr(probabilities).sum()
    return entropy.exp(), (counts > 0).to(dtype).mean()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(tensor: Tensor) -> None:
    if _is_distributed():
        dist.all_reduce(tensor)
