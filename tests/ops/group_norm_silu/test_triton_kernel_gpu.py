"""The Triton kernels of group_norm_silu at full size; they need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops

pytestmark = pytest.mark.gpu

Inputs = tuple[Tensor, Tensor, Tensor]

FULL_SIZES = [
    (1, 128, 512, 512), (1, 256, 512, 512), (1, 512, 128, 128), (2, 320, 64, 64), (2, 640, 32, 32),
    (2, 960, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8), (2, 1920, 16, 16), (2, 2560, 8, 8),
    (4, 224, 64, 64), (3, 160, 65, 63),
]  # fmt: skip


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> Inputs:
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(2, shape[1], device="cuda").to(dtype)
    return x, weight, bias


def _gradients(inputs: Inputs, upstream: Tensor, fused: bool) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    x, weight, bias = leaves
    if fused:
        with ops.backend("triton"):
            y = ops.group_norm_silu(x, 32, weight, bias)
    else:
        y = F.silu(F.group_norm(x, 32, weight, bias))
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", FULL_SIZES, ids=str)
def test_full_sizes(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    assert_accurate: Any,
) -> None:
    inputs = _inputs(shape, dtype, memory_format)
    upstream = torch.randn(shape, device="cuda").to(dtype)
    exact = _gradients(tuple(v.double().contiguous() for v in inputs), upstream, fused=False)
    plain = _gradients(tuple(v.contiguous() for v in inputs), upstream, fused=False)
    found = _gradients(inputs, upstream, fused=True)
    assert found[0].is_contiguous(memory_format=memory_format)
    for actual, same_dtype, truth in zip(found, plain, exact, strict=True):
        assert_accurate(actual, same_dtype, truth)


@pytest.mark.parametrize("shape", [(1, 128, 512, 512), (2, 320, 64, 64), (2, 1280, 8, 8)], ids=str)
def test_a_hundred_runs_are_bit_equal(shape: tuple[int, ...]) -> None:
    inputs = _inputs(shape, torch.bfloat16, torch.channels_last)
    upstream = torch.randn(shape, device="cuda")
    first = _gradients(inputs, upstream, fused=True)
    for _ in range(99):
        again = _gradients(inputs, upstream, fused=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    x = torch.randn(3, 128, 2400, 2400, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    x = x.contiguous(memory_format=torch.channels_last)
    with ops.backend("triton"):
        y = ops.group_norm_silu(x, 32)
    expected = F.silu(F.group_norm(x[2:].float(), 32))
    torch.testing.assert_close(y[2:].float(), expected, rtol=2e-3, atol=2e-3)


def test_replay_of_a_graph_and_a_side_stream() -> None:
    inputs = _inputs((2, 320, 64, 64), torch.float16, torch.channels_last)
    x, weight, bias = inputs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ops.backend("triton"):
        on_side_stream = ops.group_norm_silu(x, 32, weight, bias)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ops.backend("triton"):
        captured = ops.group_norm_silu(x, 32, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    with ops.backend("triton"):
        expected = ops.group_norm_silu(x, 32, weight, bias)
    assert torch.equal(captured, expected)
    assert not torch.equal(on_side_stream, expected)
