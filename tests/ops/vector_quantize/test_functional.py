"""vector_quantize on each backend: the nearest code, ties, NaN, losses, gradients, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import ConfigError, NonFiniteLossError
from fastldm.ops import VectorQuantizeOutput, backend, vector_quantize

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["contiguous", "channels_last", "sliced", "channels_last sliced"]


@pytest.fixture(autouse=True)
def _on_backend(lookup_backend: str) -> Iterator[None]:
    with backend(lookup_backend):
        yield


def _operands(
    shape: tuple[int, ...] = (3, 5, 7, 9), codes: int = 50, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(codes)
    z = torch.randn(shape, generator=generator).to(dtype)
    return z, torch.randn(codes, shape[1], generator=generator).to(dtype)


def _formula(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 of 1711.00937 for given indices."""
    chosen = F.embedding(indices, codebook).movedim(-1, 1)
    straight_through = z + (chosen - z).detach()
    codebook_loss = (z.detach() - chosen).square().mean()
    return straight_through, codebook_loss, (z - chosen.detach()).square().mean()


def _gradients(outputs: tuple[Tensor, Tensor, Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return torch.autograd.grad(list(outputs), leaves, upstream)


def _run(z: Tensor, codebook: Tensor) -> tuple[VectorQuantizeOutput, tuple[Tensor, ...]]:
    leaves = [z.detach().requires_grad_(), codebook.detach().requires_grad_()]
    found = vector_quantize(*leaves)
    return found, _gradients((found.z_q, found.codebook_loss, found.commitment_loss), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nearest_code_losses_and_gradients(
    dtype: torch.dtype, layout: str, laid_out: Any, assert_accurate: Any
) -> None:
    z, codebook = _operands(dtype=dtype)
    found, gradients = _run(laid_out(z, layout), codebook)
    exact_z, exact_codebook = z.double(), codebook.double()
    distances = (exact_z.movedim(1, -1)[..., None, :] - exact_codebook).square().sum(-1)
    chosen = distances.gather(-1, found.indices[..., None])[..., 0]
    # float32 may prefer another code only where the two are as near as its rounding.
    assert (chosen <= distances.amin(-1) * (1 + 1e-5)).all()
    assert torch.equal(found.z_q, F.embedding(found.indices, codebook).movedim(-1, 1))
    assert found.z_q.dtype == dtype
    assert found.indices.dtype == torch.int64
    if layout in ("contiguous", "channels_last"):
        assert found.z_q.stride() == gradients[0].stride() == laid_out(z, layout).stride()

    leaves = [exact_z.requires_grad_(), exact_codebook.requires_grad_()]
    truth = _formula(*leaves, found.indices)
    true_gradients = _gradients(truth, leaves)
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for loss, true_loss in zip(found[2:], truth[1:], strict=True):
        assert loss.dtype == loss_dtype
        torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=0)
    wide = [value.detach().to(loss_dtype).requires_grad_() for value in (z, codebook)]
    plain_gradients = _gradients(_formula(*wide, found.indices), wide)
    for got, plain, exact in zip(gradients, plain_gradients, true_gradients, strict=True):
        assert got.dtype == dtype
        assert_accurate(got, plain.to(dtype), exact)


@pytest.mark.parametrize(
    ("z_dtype", "codebook_dtype", "loss_dtype"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(
    z_dtype: torch.dtype, codebook_dtype: torch.dtype, loss_dtype: torch.dtype
) -> None:
    z, codebook = _operands()
    found, gradients = _run(z.to(z_dtype), codebook.to(codebook_dtype))
    assert [gradient.dtype for gradient in gradients] == [z_dtype, codebook_dtype]
    assert found.z_q.dtype == z_dtype
    assert found.codebook_loss.dtype == loss_dtype
    rounded = F.embedding(found.indices, codebook.to(codebook_dtype)).movedim(-1, 1).to(z_dtype)
    assert torch.equal(found.z_q, rounded)


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((4,), 0), ((9, 4), 1), ((9, 4), -1), ((2, 3, 4), 2), ((2, 4, 3), -2), ((2, 4, 3, 1, 5), 1),
     ((4, 3, 2), 0), ((2, 4, 1, 1), 1)],
)  # fmt: skip
def test_any_rank_and_channel_dim(shape: tuple[int, ...], channel_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    z, codebook = torch.randn(shape, generator=generator), torch.randn(6, 4, generator=generator)
    found = vector_quantize(z, codebook, channel_dim=channel_dim)
    distances = (z.movedim(channel_dim, -1)[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(found.indices, distances.argmin(-1))
    assert torch.equal(found.z_q, codebook[found.indices].movedim(-1, channel_dim))


def test_ties_go_to_the_lowest_index() -> None:
    codes = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [0.5, 0.5]])
    assert vector_quantize(z, codes).indices.tolist() == [1, 1, 2, 1]
    # Every lane of a vector register, and every remainder of its width.
    many = torch.randn(3, 4).repeat(40, 1)
    rows = torch.randn(100, 4)
    assert vector_quantize(rows, many).indices.max() < 3


def test_the_same_indices_bit_for_bit_as_the_reference() -> None:
    """Also between codes that are nearly as near: all latents and codes within a few ulp."""
    generator = torch.Generator().manual_seed(5)
    z = 1 + torch.randint(0, 8, (3000, 6), generator=generator) * 2.0**-22
    codebook = 1 + torch.randint(0, 8, (70, 6), generator=generator) * 2.0**-22
    found = vector_quantize(z, codebook)
    with backend("reference"):
        expected = vector_quantize(z, codebook)
    assert torch.equal(found.indices, expected.indices)


def test_large_common_offset_keeps_the_nearest() -> None:
    """Where the expanded form |z|² − 2z·e + |e|² cancels and chooses at random."""
    z, codebook = _operands((1, 4, 8, 8), 64)
    with backend("reference"):
        expected = vector_quantize(z.double().add(1000), codebook.double().add(1000)).indices
    z, codebook = z + 1000, codebook + 1000
    found = vector_quantize(z, codebook).indices
    assert (found == expected).float().mean() > 0.9


@pytest.mark.parametrize("codes", [1, 2, 257])
@pytest.mark.parametrize("width", [1, 3, 16, 33])
def test_codebook_sizes(codes: int, width: int) -> None:
    z, codebook = _operands((1, width, 5, 7), codes, torch.float64)
    distances = (z.movedim(1, -1)[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(vector_quantize(z, codebook).indices, distances.argmin(-1))


def test_batch_of_none() -> None:
    z, codebook = _operands((0, 5, 7, 6))
    found, (dz, dcodebook) = _run(z, codebook)
    assert found.indices.shape == (0, 7, 6)
    assert found.z_q.shape == dz.shape == z.shape
    assert found.codebook_loss.isnan()
    assert torch.equal(dcodebook, torch.zeros_like(codebook))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["z", "codebook"])
def test_nan_raises(dtype: torch.dtype, place: str) -> None:
    z, codebook = _operands(dtype=dtype)
    (z if place == "z" else codebook)[1, 2] = torch.nan
    with pytest.raises(NonFiniteLossError, match=f"{place} holds NaN"):
        vector_quantize(z, codebook)


def test_infinite_latent() -> None:
    """All distances are infinite, a tie, and the losses say so."""
    z, codebook = _operands((4, 3), 5)
    z[2, 1] = torch.inf
    found = vector_quantize(z, codebook)
    assert found.indices[2] == 0
    assert found.codebook_loss == torch.inf


def test_same_bits_for_any_number_of_threads() -> None:
    z, codebook = _operands((2, 3, 64, 64), 300)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found, gradients = _run(z, codebook)
            runs.append((*found, *gradients))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_written(layout: str, laid_out: Any, poisoned_memory: None) -> None:
    z, codebook = _operands()
    found, gradients = _run(laid_out(z, layout), codebook)
    assert found.indices.max() < len(codebook)
    assert all(value.isfinite().all() for value in (found.z_q, *gradients))


def test_neighbouring_memory_is_not_touched() -> None:
    """A slice's surroundings are neither read (NaN) nor written."""
    wide = torch.full((3, 10, 9, 11), torch.nan)
    z = wide[:, ::2, 1:8, 1:10]
    z.copy_(_operands()[0])
    before = wide.clone()
    vector_quantize(z, _operands()[1])
    assert torch.equal(wide.nan_to_num(7.0), before.nan_to_num(7.0))


def test_gradcheck_of_both_orders() -> None:
    z, codebook = _operands((2, 3, 2, 2), 4, torch.float64)
    leaves = [z.requires_grad_(), codebook.requires_grad_()]

    def losses(z: Tensor, codebook: Tensor) -> Tensor:
        # What the stop-gradients leave out is put back by the other loss.
        found = vector_quantize(z, codebook)
        return found.codebook_loss + found.commitment_loss - found.codebook_loss.detach()

    assert torch.autograd.gradcheck(losses, leaves)

    def first_derivatives(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        found = vector_quantize(z, codebook)
        total = found.codebook_loss * 0.7 + found.commitment_loss * 1.3
        return torch.autograd.grad(total, (z, codebook), create_graph=True)

    found = first_derivatives(z, codebook)
    indices = vector_quantize(z, codebook).indices
    chosen = F.embedding(indices, codebook).movedim(-1, 1)
    dz = 1.3 * (z - chosen) * (2 / z.numel())
    torch.testing.assert_close(found[0], dz)
    upstream = torch.randn_like(z)
    for got, want in zip(
        torch.autograd.grad(found[0], leaves, upstream, retain_graph=True),
        torch.autograd.grad(dz, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(first_derivatives, leaves)


def test_gradients_reach_only_what_needs_them() -> None:
    z, codebook = _operands()
    z.requires_grad_()
    found = vector_quantize(z, codebook)
    assert found.z_q.requires_grad
    assert not found.indices.requires_grad
    upstream = torch.randn_like(z)
    (dz,) = torch.autograd.grad(found.z_q, z, upstream)
    assert torch.equal(dz, upstream)
    with torch.no_grad():
        assert not vector_quantize(z, codebook).z_q.requires_grad


def test_autocast_has_no_effect() -> None:
    z, codebook = _operands()
    expected = vector_quantize(z, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = vector_quantize(z, codebook)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_once_for_every_size(layout: str, laid_out: Any) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vector_quantize, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for size in (6, 8, 11):
        z, codebook = _operands((2, 5, size, size + 1))
        z = laid_out(z, layout)
        expected, expected_gradients = _run(z, codebook)
        leaves = [z.requires_grad_(), codebook.requires_grad_()]
        actual = compiled(*leaves)
        gradients = _gradients((actual[0], actual[2], actual[3]), leaves)
        for got, want in zip((*actual, *gradients), (*expected, *expected_gradients), strict=True):
            torch.testing.assert_close(got, want)
            assert got.stride() == want.stride()
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(2, 3, 4)}, "z: got 3 channels in dimension 1; accepted: 4"),
        ({"z": torch.zeros(())}, "z: got"),
        ({"z": torch.zeros(2, 4, dtype=torch.int64)}, "z: got torch.int64"),
        ({"z": torch.zeros(2, 4, device="meta")}, "z: got .* on meta; accepted: .* on cpu"),
        ({"codebook": torch.zeros(4)}, r"codebook: got .*\[4\]"),
        ({"codebook": torch.zeros(0, 4)}, r"codebook: got .*\[0, 4\]"),
        ({"codebook": torch.zeros(6, 4, dtype=torch.int32)}, "codebook: got torch.int32"),
        ({"channel_dim": 2}, "channel_dim: got 2; accepted: -2 to 1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"z": torch.zeros(2, 4), "codebook": torch.zeros(6, 4), **changes}
    with pytest.raises(ConfigError, match=message):
        vector_quantize(**arguments)
