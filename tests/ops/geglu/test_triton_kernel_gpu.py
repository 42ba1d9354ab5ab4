"""The Triton kernels of geglu at full size; they need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops

pytestmark = pytest.mark.gpu

FULL_SIZES = [(2, 4096, 2 * 1280), (2, 1024, 2 * 2560), (2, 256, 2 * 5120), (2, 64, 2 * 5120),
              (3, 1021, 2 * 333)]  # fmt: skip


def _results(hidden: Tensor, upstream: Tensor, fused: bool) -> list[Tensor]:
    leaf = hidden.detach().requires_grad_()
    if fused:
        with ops.backend("triton"):
            y = ops.geglu(leaf)
    else:
        value, gate = leaf.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    return [y.detach(), *torch.autograd.grad(y, leaf, upstream.to(y.dtype))]


def _draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(shape, device="cuda").to(dtype)
    return hidden, torch.randn(*shape[:-1], shape[-1] // 2, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", FULL_SIZES, ids=str)
def test_full_sizes(shape: tuple[int, ...], dtype: torch.dtype, assert_accurate: Any) -> None:
    hidden, upstream = _draw(shape, dtype)
    exact = _results(hidden.double(), upstream, fused=False)
    plain = _results(hidden, upstream, fused=False)
    for got, same_dtype, truth in zip(
        _results(hidden, upstream, fused=True), plain, exact, strict=True
    ):
        assert_accurate(got, same_dtype, truth)


def test_a_hundred_runs_are_bit_equal() -> None:
    given = _draw((2, 1024, 2 * 2560), torch.bfloat16)
    first = _results(*given, fused=True)
    for _ in range(99):
        again = _results(*given, fused=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    hidden = torch.randn(2**20 + 1, 2 * 1025, device="cuda", dtype=torch.float16)
    assert hidden.numel() > 2**31
    with ops.backend("triton"):
        y = ops.geglu(hidden)
    value, gate = hidden[-3:].float().chunk(2, dim=-1)
    torch.testing.assert_close(y[-3:].float(), value * F.gelu(gate), rtol=2e-3, atol=2e-3)


def test_replay_of_a_graph_and_a_side_stream() -> None:
    hidden, _ = _draw((2, 1024, 2 * 1280), torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ops.backend("triton"):
        on_side_stream = ops.geglu(hidden)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ops.backend("triton"):
        captured = ops.geglu(hidden)
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    with ops.backend("triton"):
        expected = ops.geglu(hidden)
    assert torch.equal(captured, expected)
    assert not torch.equal(on_side_stream, expected)
