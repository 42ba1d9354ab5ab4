"""The Triton kernels of cross_attention at full size; they need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops

pytestmark = pytest.mark.gpu

Operands = tuple[Tensor, Tensor, Tensor]

# Batch, queries, keys, heads and channels of a head.
FULL_SIZES = [
    (2, 4096, 77, 8, 40), (2, 1024, 77, 8, 80), (2, 256, 77, 8, 160), (2, 64, 77, 8, 160),
    (2, 9216, 77, 5, 64), (2, 4096, 77, 10, 64), (2, 4096, 154, 10, 64), (2, 1024, 1, 8, 64),
    (4, 1024, 92, 8, 32), (2, 1000, 128, 3, 128), (2, 1024, 256, 8, 64), (1, 1023, 231, 2, 160),
    (3, 577, 16, 2, 48),
]  # fmt: skip


def _operands(size: tuple[int, ...], dtype: torch.dtype) -> Operands:
    B, Lq, Lk, H, D = size
    q, k, v = (torch.randn(B, n, H, D, device="cuda").to(dtype) for n in (Lq, Lk, Lk))
    return q, k, v


def _captions(size: tuple[int, ...]) -> Tensor:
    """Of every length, from all keys down to one."""
    B, Lk = size[0], size[2]
    lengths = torch.linspace(Lk, 1, B, device="cuda").long()
    return torch.arange(Lk, device="cuda")[None] < lengths[:, None]


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (F.softmax(scores, -1) @ v.transpose(1, 2)).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with ops.backend("triton"):
        return ops.cross_attention(q, k, v, key_mask=mask)


def _with_gradients(
    function: Any, operands: Operands, mask: Tensor | None, upstream: Tensor
) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in operands]
    o = function(*leaves, mask)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream.to(o.dtype))]


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What plain torch is compared with has no tf32 in it."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", FULL_SIZES, ids=str)
def test_full_sizes(
    size: tuple[int, ...], dtype: torch.dtype, masked: bool, assert_accurate: Any
) -> None:
    operands = _operands(size, dtype)
    mask = _captions(size) if masked else None
    upstream = torch.randn(operands[0].shape, device="cuda").to(dtype)
    q, k, v = (value.double() for value in operands)
    exact = _with_gradients(_plain, (q, k, v), mask, upstream)
    plain = _with_gradients(_plain, operands, mask, upstream)
    found = _with_gradients(_fused, operands, mask, upstream)
    for actual, same_dtype, truth in zip(found, plain, exact, strict=True):
        assert_accurate(actual, same_dtype, truth)


def test_views_of_one_projection(assert_accurate: Any) -> None:
    """Keys and values beside each other in memory, heads before queries, rows not at 16 bytes."""
    q, k, v = _operands((2, 1024, 77, 8, 40), torch.float16)
    exact = _plain(q.double(), k.double(), v.double(), None)
    plain = _plain(q, k, v, None)
    packed = torch.stack((k, v), dim=2)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    odd = F.pad(q, (1, 0))[..., 1:]
    for query in (heads_first, odd):
        assert_accurate(_fused(query, packed[:, :, 0], packed[:, :, 1], None), plain, exact)


@pytest.mark.parametrize("size", [FULL_SIZES[0], FULL_SIZES[2], FULL_SIZES[10]], ids=str)
def test_a_hundred_runs_are_bit_equal(size: tuple[int, ...]) -> None:
    operands, mask = _operands(size, torch.bfloat16), _captions(size)
    upstream = torch.randn(operands[0].shape, device="cuda")
    first = _with_gradients(_fused, operands, mask, upstream)
    for _ in range(99):
        again = _with_gradients(_fused, operands, mask, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    q, k, v = _operands((3, 70000, 77, 64, 160), torch.float16)
    assert q.numel() > 2**31
    o = _fused(q, k, v, None)
    expected = _plain(q[2:, -64:].float(), k[2:].float(), v[2:].float(), None)
    torch.testing.assert_close(o[2:, -64:].float(), expected, rtol=2e-3, atol=2e-3)


def test_replay_of_a_graph_and_a_side_stream() -> None:
    q, k, v = _operands((2, 4096, 77, 8, 40), torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_side_stream = _fused(q, k, v, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _fused(q, k, v, None)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, _fused(q, k, v, None))
    assert not torch.equal(on_side_stream, captured)
