"""The codebook lookup on the CPU against FAISS, vector-quantize-pytorch and plain torch.

The sizes are those of LDM's first stages, one with few codes and one of wide latents. The lookup
also gathers the codes and sums the loss; FAISS gives indices and distances.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Race
from fastldm.ops import VectorQuantizeOutput, codebook_statistics, vector_quantize

SIZES = [(16384, 3, 8192), (4096, 4, 16384), (1024, 8, 16384), (65536, 4, 256), (4096, 256, 1024)]
"""Latents, depth, codes."""


def _operands(latents: int, depth: int, codes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = min(latents, 64)
    z = torch.randn(1, depth, latents // width, width, generator=generator)
    return z, torch.randn(codes, depth, generator=generator)


def _assert_nearest(z: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """In float64, as near as the nearest but for the rounding of float32 distances."""
    rows = z.movedim(1, -1).flatten(0, -2)[:512].double()
    distances = torch.cdist(rows, codebook.double()).square()
    chosen = distances.gather(1, indices.flatten()[:512, None])[:, 0]
    assert (chosen <= distances.amin(1) * (1 + 1e-4) + 1e-9).all()


def _plain(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What CompVis's code does: the expanded matrix of distances, argmin, gather, loss."""
    rows = z.movedim(1, -1).flatten(0, -2)
    distances = (
        rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T
    )
    indices = distances.argmin(1)
    chosen = codebook[indices]
    return chosen, indices, (chosen - rows).square().mean()


def _faiss(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = z.movedim(1, -1).flatten(0, -2).contiguous().numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1])


def _vector_quantize_pytorch(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    package = pytest.importorskip("vector_quantize_pytorch")
    module = package.VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).eval()
    module._codebook.embed.data.copy_(codebook)
    rows = z.movedim(1, -1).flatten(0, -2)[None].contiguous()

    @torch.no_grad()
    def call() -> Tensor:
        indices: Tensor = module(rows)[1]
        return indices

    return call


@pytest.mark.parametrize("size", SIZES, ids="N{0[0]} D{0[1]} K{0[2]}".format)
def test_lookup(size: tuple[int, int, int], race: Race) -> None:
    z, codebook = _operands(*size)
    peers: dict[str, Callable[[], Tensor]] = {
        "faiss IndexFlatL2": _faiss(z, codebook),
        "vector-quantize-pytorch": _vector_quantize_pytorch(z, codebook),
        "plain torch": lambda: _plain(z, codebook)[1],
    }

    def own() -> VectorQuantizeOutput:
        return vector_quantize(z, codebook)

    indices = own().indices
    _assert_nearest(z, codebook, indices)
    for peer in peers.values():
        assert (peer().flatten() == indices.flatten()).float().mean() > 0.99
    race({"fastldm": own, **peers}, rounds=5 if size[0] * size[2] > 2**25 else 21)


@pytest.mark.parametrize("size", SIZES, ids="N{0[0]} D{0[1]} K{0[2]}".format)
def test_forward_and_backward(size: tuple[int, int, int], race: Race) -> None:
    z, codebook = (value.requires_grad_() for value in _operands(*size))

    def step(lookup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        z_q, loss = lookup(z, codebook)
        return torch.autograd.grad(z_q.sum() + loss, (z, codebook))

    def own_lookup(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        found = vector_quantize(z, codebook)
        return found.z_q, found.codebook_loss + 0.25 * found.commitment_loss

    def plain_lookup(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            indices = _plain(z, codebook)[1]
        rows = z.movedim(1, -1).flatten(0, -2)
        chosen = torch.nn.functional.embedding(indices, codebook)
        loss = (chosen - rows.detach()).square().mean() + 0.25 * (
            chosen.detach() - rows
        ).square().mean()
        return rows + (chosen - rows).detach(), loss

    for got, want in zip(step(own_lookup), step(plain_lookup), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    race({"fastldm": lambda: step(own_lookup), "plain torch": lambda: step(plain_lookup)}, rounds=5)


@pytest.mark.parametrize("size", SIZES, ids="N{0[0]} D{0[1]} K{0[2]}".format)
def test_statistics(size: tuple[int, int, int], race: Race) -> None:
    z, codebook = _operands(*size)
    indices = vector_quantize(z, codebook).indices

    def plain() -> tuple[Tensor, Tensor]:
        rows, flat = z.movedim(1, -1).flatten(0, -2), indices.flatten()
        counts = torch.bincount(flat, minlength=len(codebook))
        return counts, torch.zeros_like(codebook).index_add_(0, flat, rows)

    own, (counts, sums) = codebook_statistics(z, indices, len(codebook)), plain()
    assert torch.equal(own.counts, counts)
    torch.testing.assert_close(own.sums, sums, rtol=1e-4, atol=1e-4)
    race(
        {
            "fastldm": lambda: codebook_statistics(z, indices, len(codebook)),
            "bincount and index_add_": plain,
        },
        rounds=21,
    )
