"""Codebook usage and perplexity against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError, DataError
from fastldm.metrics import CodebookStatistics, codebook_perplexity, codebook_usage


def test_against_the_definitions() -> None:
    indices = torch.tensor([[0, 0, 3], [3, 0, 7]])
    shares = np.array([3, 2, 1]) / 6
    assert codebook_usage(indices, 8) == 3 / 8
    entropy = -(shares * np.log(shares)).sum()
    assert codebook_perplexity(indices, 8) == pytest.approx(np.exp(entropy), rel=1e-12)


def test_extremes() -> None:
    assert codebook_perplexity(torch.arange(16).repeat(3), 16) == pytest.approx(16)
    assert codebook_usage(torch.arange(16), 16) == 1
    assert codebook_perplexity(torch.full((4,), 2), 16) == pytest.approx(1)
    assert codebook_perplexity(torch.zeros(0, dtype=torch.int64), 16) == 0
    assert codebook_usage(torch.zeros(0, dtype=torch.int64), 16) == 0


def test_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 40, (6, 5, 5), generator=generator)
    statistics = CodebookStatistics(64)
    for batch in indices.split(2):
        statistics.update(batch)
    assert statistics.usage == codebook_usage(indices, 64)
    assert statistics.perplexity == pytest.approx(codebook_perplexity(indices, 64), rel=1e-12)


def test_bad_indices_are_named() -> None:
    with pytest.raises(DataError, match=r"expected 0…7, got 0…8"):
        codebook_usage(torch.tensor([0, 8]), 8)
    with pytest.raises(DataError, match=r"expected 0…7, got -1…3"):
        codebook_usage(torch.tensor([-1, 3]), 8)
    with pytest.raises(DataError, match=r"integers, got torch\.float32"):
        codebook_usage(torch.zeros(2), 8)
    with pytest.raises(ConfigError, match="codebook_size: expected a number ≥ 1, got 0"):
        CodebookStatistics(0)
