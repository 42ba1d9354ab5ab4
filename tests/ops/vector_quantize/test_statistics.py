"""codebook_statistics on each backend: counts, sums, order, layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import backend, codebook_statistics

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _on_backend(lookup_backend: str) -> Iterator[None]:
    with backend(lookup_backend):
        yield


def _assigned(
    shape: tuple[int, ...] = (3, 11, 7, 9), codes: int = 9, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Latents, and indices among which one code is in most places and one in none."""
    generator = torch.Generator().manual_seed(codes)
    z = torch.randn(shape, generator=generator).to(dtype)
    indices = torch.randint(0, codes - 1, (shape[0], *shape[2:]), generator=generator)
    return z, indices.where(indices > 3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_counts_and_sums(
    dtype: torch.dtype, layout: str, laid_out: Any, assert_accurate: Any
) -> None:
    z, indices = _assigned(dtype=dtype)
    found = codebook_statistics(laid_out(z, layout), indices, 9)
    one_hot = F.one_hot(indices.flatten(), 9)
    assert torch.equal(found.counts, one_hot.sum(0))
    assert found.counts[0] > len(one_hot) // 3
    assert found.counts[8] == 0
    rows = z.movedim(1, -1).flatten(0, -2)
    exact = one_hot.double().T @ rows.double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.sums.dtype == wide
    assert_accurate(found.sums, one_hot.to(wide).T @ rows.to(wide), exact)


def test_no_gradient_passes() -> None:
    z, indices = _assigned()
    assert not codebook_statistics(z.requires_grad_(), indices, 9).sums.requires_grad


def test_same_bits_for_any_number_of_threads() -> None:
    z, indices = _assigned((4, 24, 32, 32), 40)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(codebook_statistics(z, indices, 40).sums)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_batch_of_none_and_channel_dim() -> None:
    found = codebook_statistics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 4)
    assert torch.equal(found.counts, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(found.sums, torch.zeros(4, 3))
    z = torch.arange(6.0).view(3, 2)
    found = codebook_statistics(z, torch.tensor([1, 1]), 2, channel_dim=-2)
    assert found.sums.tolist() == [[0, 0, 0], [1, 5, 9]]


def test_compiled() -> None:
    torch._dynamo.reset()
    z, indices = _assigned()
    compiled = torch.compile(codebook_statistics, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, want in zip(compiled(z, indices, 9), codebook_statistics(z, indices, 9), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(2, 4, dtype=torch.int64)}, "z: got torch.int64"),
        ({"indices": torch.zeros(2, dtype=torch.int32)}, "indices: got torch.int32"),
        ({"indices": torch.zeros(3, dtype=torch.int64)}, r"indices: got .*\[3\].*accepted.*\[2\]"),
        ({"num_embeddings": 0}, "num_embeddings: got 0; accepted: 1 or more"),
        ({"channel_dim": 2}, "channel_dim: got 2; accepted: -2 to 1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "z": torch.zeros(2, 4), "indices": torch.zeros(2, dtype=torch.int64), "num_embeddings": 6,
        **changes,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        codebook_statistics(**arguments)


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(IndexError):
        codebook_statistics(torch.zeros(2, 4), torch.tensor([0, 6]), 6)
