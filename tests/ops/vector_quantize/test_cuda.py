"""The CUDA lookup on a GPU: against the reference, in graphs, on streams, at sizes beyond 2³¹."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastldm.errors import NonFiniteLossError
from fastldm.ops import _extension, backend, codebook_statistics, vector_quantize

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Depth, codes, batch, height, width: LDM's first stages, and wide latents.
SIZES = [(2, 2048, 1, 128, 128), (3, 8192, 4, 64, 64), (4, 256, 16, 64, 64), (4, 16384, 4, 32, 32),
         (8, 16384, 4, 16, 16), (16, 16384, 4, 8, 8), (256, 1024, 4, 32, 32), (5, 37, 3, 7, 9),
         (40, 100, 2, 5, 11)]  # fmt: skip


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    problem = _extension.problem() or _extension.cuda_problem(torch.device("cuda"))
    if problem:
        pytest.skip(problem)
    with backend("cpp"):
        yield


def _random(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    depth, codes, batch, height, width = size
    generator = torch.Generator("cuda").manual_seed(depth + codes)
    z = torch.randn(batch, depth, height, width, generator=generator, device="cuda").to(dtype)
    return z, torch.randn(codes, depth, generator=generator, device="cuda")


def _gradients(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    leaves = [z.detach().requires_grad_(), codebook.detach().requires_grad_()]
    found = vector_quantize(*leaves)
    generator = torch.Generator("cuda").manual_seed(0)
    upstream = torch.randn(z.shape, generator=generator, device="cuda").to(z.dtype)
    total = (found.z_q * upstream).float().sum() + 0.7 * found.codebook_loss
    return torch.autograd.grad(total + 1.3 * found.commitment_loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_as_the_reference(size: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    z, codebook = _random(size, dtype)
    if layout == "channels_last":
        z = z.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        z = torch.cat([z, z], 1)[:, ::2, :, 1:]
    found, gradients = vector_quantize(z, codebook), _gradients(z, codebook)
    statistics = codebook_statistics(z, found.indices, len(codebook))
    with backend("reference"):
        expected, true_gradients = vector_quantize(z, codebook), _gradients(z, codebook)
        true_statistics = codebook_statistics(z, found.indices, len(codebook))
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.z_q, expected.z_q)
    assert found.z_q.stride() == expected.z_q.stride()
    torch.testing.assert_close(found.codebook_loss, expected.codebook_loss, rtol=1e-6, atol=0)
    for got, want in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(statistics.counts, true_statistics.counts)
    torch.testing.assert_close(statistics.sums, true_statistics.sums, rtol=1e-5, atol=1e-4)


def test_undecided_scores() -> None:
    for depth in (6, 24):
        z, codebook = _random((depth, 300, 2, 16, 16))
        tied = 1 + (z * 4).round() * 2.0**-22, 1 + (codebook * 4).round() * 2.0**-22
        for operands in (tied, (z, codebook.repeat(2, 1)), (z, codebook * 1e-6)):
            found = vector_quantize(*operands).indices
            with backend("reference"):
                assert torch.equal(found, vector_quantize(*operands).indices)


@pytest.mark.parametrize("size", [(3, 8192, 4, 64, 64), (256, 1024, 4, 32, 32)], ids=str)
def test_a_hundred_runs_give_the_same_bits(size: tuple[int, ...]) -> None:
    z, codebook = _random(size)

    def run() -> tuple[Tensor, ...]:
        found = vector_quantize(z, codebook)
        statistics = codebook_statistics(z, found.indices, len(codebook))
        return (*found, *_gradients(z, codebook), *statistics)

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_nan_raises_and_in_a_graph_gives_index_0_and_a_nan_loss() -> None:
    z, codebook = _random((4, 256, 2, 16, 16))
    vector_quantize(z, codebook)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = vector_quantize(z, codebook)
    graph.replay()
    assert torch.equal(found.indices, vector_quantize(z, codebook).indices)
    z[1, 2, 3, 4] = torch.nan
    graph.replay()
    assert found.indices[1, 3, 4] == 0
    assert found.codebook_loss.isnan()
    with pytest.raises(NonFiniteLossError, match="z holds NaN"):
        vector_quantize(z, codebook)
    z.normal_()
    codebook[9, 1] = torch.nan
    graph.replay()
    assert not found.indices.any()
    assert found.codebook_loss.isnan()
    with pytest.raises(NonFiniteLossError, match="codebook holds NaN"):
        vector_quantize(z, codebook)


def test_another_stream() -> None:
    z, codebook = _random((3, 8192, 4, 64, 64))
    expected = vector_quantize(z, codebook).indices
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(z)
        torch.cuda._sleep(10_000_000)
        late.copy_(z)
        found = vector_quantize(late, codebook).indices
    stream.synchronize()
    assert torch.equal(found, expected)


def test_no_matrix_of_distances() -> None:
    z, codebook = _random((3, 8192, 4, 64, 64))
    vector_quantize(z, codebook)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vector_quantize(z, codebook)
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20


CORNERS = ((slice(8), slice(64)), (slice(-8, None), slice(-64, None)))


def _huge() -> tuple[Tensor, Tensor]:
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    codebook = torch.randn(64, 4, device="cuda")
    z = torch.empty(2, 4, 2**14, 2**14 + 8, dtype=torch.float16, device="cuda").normal_()
    assert z.numel() > 2**31
    return z, codebook


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    z, codebook = _huge()
    found = vector_quantize(z, codebook)
    for rows, columns in CORNERS:
        expected = vector_quantize(z[:, :, rows, columns].contiguous(), codebook)
        assert torch.equal(found.indices[:, rows, columns], expected.indices)
        assert torch.equal(found.z_q[:, :, rows, columns], expected.z_q)


@pytest.mark.slow
def test_gradients_and_statistics_of_more_than_2_to_the_31_elements() -> None:
    z, codebook = (value.requires_grad_() for value in _huge())
    found = vector_quantize(z, codebook)
    # Half the sum of the squares: its gradients are z − e and, summed over each code, e − z.
    total = (found.commitment_loss + found.codebook_loss) * (z.numel() / 2)
    grad_z, grad_codebook = torch.autograd.grad(total, (z, codebook))
    z, codebook = z.detach(), codebook.detach()
    for rows, columns in CORNERS:
        chosen = codebook[found.indices[:, rows, columns]].movedim(-1, 1)
        expected = z[:, :, rows, columns].float() - chosen
        torch.testing.assert_close(
            grad_z[:, :, rows, columns].float(), expected, rtol=2e-3, atol=1e-5
        )
    statistics = codebook_statistics(z, found.indices, len(codebook))
    flat = found.indices.flatten()
    counts = torch.bincount(flat, minlength=len(codebook))
    assert torch.equal(statistics.counts, counts)
    # What rounding does to sums of millions of numbers of about 1.
    slack = 1e-5 * counts.max().item()
    for d in range(codebook.shape[1]):
        sums = torch.zeros(len(codebook), dtype=torch.float64, device="cuda")
        sums.index_add_(0, flat, z[:, d].flatten().double())
        torch.testing.assert_close(statistics.sums[:, d].double(), sums, rtol=0, atol=slack)
        to_codes = counts * codebook[:, d].double() - sums
        torch.testing.assert_close(grad_codebook[:, d].double(), to_codes, rtol=0, atol=slack)
