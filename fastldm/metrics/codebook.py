"""How much of a codebook a data set uses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.errors import ConfigError, DataError


class CodebookStatistics:
    """Counts of the codes chosen over any number of batches.

    Args:
        codebook_size: number of codes K.

    Raises:
        ConfigError: `codebook_size` is below 1.
    """

    def __init__(self, codebook_size: int) -> None:
        if codebook_size < 1:
            raise ConfigError(f"codebook_size: expected a number ≥ 1, got {codebook_size!r}")
        self.codebook_size = codebook_size
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, indices: Tensor) -> None:
        """Count the codes of `indices`, integers 0…K−1 of any shape.

        Raises:
            DataError: an index is outside of the codebook or no integer.
        """
        if indices.is_floating_point() or indices.is_complex():
            raise DataError(f"indices: expected integers, got {indices.dtype}")
        codes = indices.detach().flatten().cpu()
        if codes.numel() == 0:
            return
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise DataError(
                f"indices: expected 0…{self.codebook_size - 1}, got {int(codes.min())}…"
                f"{int(codes.max())}"
            )
        self.counts += torch.bincount(codes, minlength=self.codebook_size)

    @property
    def usage(self) -> float:
        """Share of the codes chosen at least once, 0…1."""
        return float((self.counts > 0).double().mean())

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the choices: 1 for a single code, K for all alike; 0 for none."""
        counts = self.counts[self.counts > 0].double()
        if counts.numel() == 0:
            return 0.0
        share = counts / counts.sum()
        return float(torch.exp(-(share * share.log()).sum()))


def codebook_usage(indices: Tensor, codebook_size: int) -> float:
    """Share of the K codes that `indices` (any shape) holds, 0…1."""
    statistics = CodebookStatistics(codebook_size)
    statistics.update(indices)
    return statistics.usage


def codebook_perplexity(indices: Tensor, codebook_size: int) -> float:
    """exp of the entropy of the codes in `indices` (any shape), 1…K."""
    statistics = CodebookStatistics(codebook_size)
    statistics.update(indices)
    return statistics.perplexity
