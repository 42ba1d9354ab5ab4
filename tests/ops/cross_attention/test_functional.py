"""cross_attention against float64, masks, gradients of both orders, compilation, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastldm.errors import ConfigError
from fastldm.ops import backend, cross_attention

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _operands(dtype: torch.dtype, lq: int = 9, lk: int = 7, width: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(lq + lk)
    return [torch.randn(3, n, 2, width, generator=generator).to(dtype) for n in (lq, lk, lk)]


def _mask(lk: int = 7) -> Tensor:
    """All keys, some keys, one key."""
    mask = torch.ones(3, lk, dtype=torch.bool)
    mask[1, lk // 2 :] = False
    mask[2, 1:] = False
    return mask


def _formula(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Unfused attention in the operands' dtype."""
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (F.softmax(scores, -1) @ v.transpose(1, 2)).transpose(1, 2)


def _with_gradients(
    function: Callable[..., Tensor], operands: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in operands]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_every_gradient(
    dtype: torch.dtype, masked: bool, scale: float | None, assert_accurate: Any
) -> None:
    operands, mask = _operands(dtype), _mask() if masked else None
    upstream = torch.randn(3, 9, 2, 40).to(dtype)
    factor = 40**-0.5 if scale is None else scale
    exact = _with_gradients(
        lambda *o: _formula(*o, factor, mask), [value.double() for value in operands], upstream
    )
    plain = _with_gradients(lambda *o: _torch_attention(*o, factor, mask), operands, upstream)
    actual = _with_gradients(
        lambda *o: cross_attention(*o, scale=scale, key_mask=mask), operands, upstream
    )
    for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert got.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)
        else:
            assert_accurate(got, same_dtype, truth)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("lq", "lk", "width"), [(1, 1, 8), (5, 77, 32), (0, 3, 16), (33, 3, 160)])
def test_lengths(lq: int, lk: int, width: int) -> None:
    operands = _operands(torch.float64, lq, lk, width)
    upstream = torch.randn(3, lq, 2, width, dtype=torch.float64)
    exact = _with_gradients(lambda *o: _formula(*o, width**-0.5, None), operands, upstream)
    actual = _with_gradients(cross_attention, operands, upstream)
    for got, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("path")
def test_batch_of_none() -> None:
    operands = [torch.zeros(0, n, 2, 8) for n in (4, 3, 3)]
    actual = _with_gradients(cross_attention, operands, torch.zeros(0, 4, 2, 8))
    assert [value.shape for value in actual] == [(0, 4, 2, 8), *(o.shape for o in operands)]


@pytest.mark.usefixtures("path")
def test_a_sample_without_keys_gives_zero_and_no_gradient() -> None:
    operands, mask = _operands(torch.float32), _mask()
    mask[1] = False
    actual = _with_gradients(
        lambda *o: cross_attention(*o, key_mask=mask), operands, torch.randn(3, 9, 2, 40)
    )
    for value in actual:
        assert torch.equal(value[1], torch.zeros_like(value[1]))
        assert value.isfinite().all()
        assert value[0].abs().max() > 0


@pytest.mark.usefixtures("path")
def test_masked_keys_are_not_read() -> None:
    """Whatever finite value padding holds, it does not change the result."""
    (q, k, v), mask = _operands(torch.float32), _mask()
    expected = cross_attention(q, k, v, key_mask=mask)
    padding = ~mask[..., None, None]
    k, v = k.masked_fill(padding, 1e4), v.masked_fill(padding, -1e4)
    assert torch.equal(cross_attention(q, k, v, key_mask=mask), expected)


@pytest.mark.usefixtures("path")
def test_strides() -> None:
    """Heads first, packed keys and values, and a sliced query, as projections give them."""
    q, k, v = _operands(torch.float32)
    expected = cross_attention(q, k, v)
    packed = torch.stack((k, v), dim=3)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat((q, torch.full_like(q, torch.nan)), dim=-1)[..., :40]
    for query in (heads_first, wide):
        actual = cross_attention(query, packed[:, :, :, 0], packed[:, :, :, 1])
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_both_orders(masked: bool) -> None:
    leaves = [value.requires_grad_() for value in _operands(torch.float64, 3, 4, 2)]
    mask = _mask(4) if masked else None
    if mask is not None:
        mask[1] = False

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cross_attention(q, k, v, key_mask=mask)

    assert torch.autograd.gradcheck(function, leaves)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivatives_that_torch_lacks_raise() -> None:
    operands = [value.requires_grad_() for value in _operands(torch.float32)]
    with backend("reference"):
        out = cross_attention(*operands)
    (dq,) = torch.autograd.grad(out, operands[0], torch.ones_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.autograd.grad(dq, operands[0], torch.ones_like(dq))


@pytest.mark.usefixtures("path")
def test_autocast_casts_as_torch_does() -> None:
    operands, upstream = _operands(torch.float32), torch.randn(3, 9, 2, 40)
    expected = cross_attention(*(value.bfloat16() for value in operands))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = cross_attention(*operands)
        mixed = cross_attention(operands[0], operands[1].bfloat16(), operands[2])
        inside = _with_gradients(cross_attention, operands, upstream)
    outside = _with_gradients(
        lambda *o: cross_attention(*(value.bfloat16() for value in o)), operands, upstream
    )
    assert torch.equal(actual, expected)
    assert torch.equal(mixed, expected)
    assert inside[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_attention(*(value.double() for value in operands)).dtype == torch.float64


@pytest.mark.usefixtures("path")
def test_runs_are_bit_equal_and_every_element_is_written(poisoned_memory: None) -> None:
    operands, upstream = _operands(torch.float32), torch.randn(3, 9, 2, 40)
    runs = [_with_gradients(cross_attention, operands, upstream) for _ in range(3)]
    for run in runs:
        assert all(
            torch.equal(a, b) and a.isfinite().all() for a, b in zip(run, runs[0], strict=True)
        )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_once_for_every_size(masked: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cross_attention, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for lq, lk in [(9, 7), (16, 5), (25, 11)]:
        operands, mask = _operands(torch.float32, lq, lk), _mask(lk) if masked else None
        upstream = torch.randn(3, lq, 2, 40)
        expected = _with_gradients(
            lambda *o, m=mask: cross_attention(*o, key_mask=m), operands, upstream
        )
        actual = _with_gradients(lambda *o, m=mask: compiled(*o, key_mask=m), operands, upstream)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q: got .*\[2, 3, 4\].*accepted: a floating tensor"),
        ({"q": torch.zeros(2, 3, 1, 4, dtype=torch.int64)}, "q: got torch.int64"),
        ({"k": torch.zeros(2, 5, 1, 3)}, r"k: got .*accepted: a floating tensor \[2, 5, 1, 4\]"),
        ({"k": torch.zeros(2, 0, 1, 4)}, "k: got .*Lk ≥ 1"),
        ({"v": torch.zeros(2, 6, 1, 4)}, "v: got"),
        ({"v": torch.zeros(2, 5, 1, 4).half()}, "v: got torch.float16; accepted: torch.float32"),
        ({"key_mask": torch.zeros(2, 5)}, r"key_mask: got torch.float32.*torch.bool of .*\[2, 5\]"),
        ({"key_mask": torch.zeros(2, 4, dtype=torch.bool)}, "key_mask: got"),
        ({"key_mask": torch.zeros(2, 5, dtype=torch.bool, device="meta")}, "key_mask: .* meta"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 1, 4),
        "k": torch.zeros(2, 5, 1, 4),
        "v": torch.zeros(2, 5, 1, 4),
        **changes,
    }
    with pytest.raises(ConfigError, match=message):
        cross_attention(**arguments)
