"""The C++ kernels of cross_attention: accuracy, masks, bits, memory and extreme values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops
from fastldm.errors import BackendUnavailableError
from fastldm.ops import _dispatch, _extension

pytestmark = pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# B, Lq, Lk, H, D
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 5, 3, 2, 8),
    (2, 33, 77, 2, 40),  # neither queries nor keys fill their tiles
    (1, 150, 77, 1, 80),  # two calls of a kernel
    (1, 20, 12, 2, 7),  # rows that fill no register
    (1, 17, 256, 1, 160),
    (1, 40, 260, 1, 24),  # two blocks of keys
    (1, 130, 600, 1, 16),
    (1, 9, 20, 1, 300),  # longer than a chain of products
]
Operands = list[Tensor]


@pytest.fixture(autouse=True)
def _served_by_cpp() -> Iterator[None]:
    with ops.backend("cpp"):
        yield


def _operands(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Operands:
    """q, k, v and an upstream gradient."""
    batch, lq, lk, heads, width = size
    generator = torch.Generator().manual_seed(lq + lk)
    return [
        torch.randn(batch, n, heads, width, generator=generator).to(dtype) for n in (lq, lk, lk, lq)
    ]


def _mask(batch: int, lk: int) -> Tensor:
    """Holes, no first key, no last key; never no key."""
    mask = torch.rand(batch, lk, generator=torch.Generator().manual_seed(lk)) < 0.6
    mask[:, [0, -1]] = False
    mask[:, lk // 2] = True
    return mask


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Unfused attention in the operands' dtype."""
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (F.softmax(scores, -1) @ v.transpose(1, 2)).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return ops.cross_attention(q, k, v, key_mask=mask)


def _with_gradients(
    function: Callable[..., Tensor], operands: Operands, mask: Tensor | None = None
) -> Operands:
    *values, upstream = operands
    leaves = [value.detach().requires_grad_() for value in values]
    o = function(*leaves, mask)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_every_gradient(
    size: tuple[int, ...], masked: bool, dtype: torch.dtype, assert_accurate: Any
) -> None:
    operands, mask = _operands(size, dtype), _mask(size[0], size[2]) if masked else None
    exact = _with_gradients(_plain, [value.double() for value in operands], mask)
    plain = _with_gradients(_plain, operands, mask)
    actual = _with_gradients(_fused, operands, mask)
    for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[int, ...]) -> None:
    operands = _operands((2, 33, 77, 2, 40))
    expected = _with_gradients(_fused, operands)
    *values, upstream = operands
    for i in wanted:
        values[i] = values[i].requires_grad_()
    found = torch.autograd.grad(_fused(*values, None), [values[i] for i in wanted], upstream)
    for i, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, expected[1 + i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(2, 150, 77, 3, 40), (1, 260, 300, 1, 24)], ids=str)
def test_the_same_bits_for_any_number_of_threads(
    size: tuple[int, ...], masked: bool, dtype: torch.dtype
) -> None:
    operands, mask = _operands(size, dtype), _mask(size[0], size[2]) if masked else None
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(_with_gradients(_fused, operands, mask))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_query_has_the_same_bits_in_any_company() -> None:
    q, k, v, _ = _operands((1, 150, 300, 2, 24))
    together = _fused(q, k, v, None)
    for i in (0, 15, 16, 130, 149):
        alone = _fused(q[:, i : i + 1], k, v, None)
        assert torch.equal(alone, together[:, i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 3, 2, 7), (1, 33, 77, 2, 40)], ids=str)
def test_every_element_is_written_and_none_beside(
    size: tuple[int, ...], dtype: torch.dtype, padded_memory: Any
) -> None:
    operands, mask = _operands(size, dtype), _mask(size[0], size[2])
    expected = _with_gradients(_fused, operands, mask)
    with padded_memory() as memory:
        found = _with_gradients(_fused, operands, mask)
    assert memory.tensors >= len(found)
    memory.assert_untouched()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_mask_leaves_out_is_not_read(dtype: torch.dtype) -> None:
    q, k, v, upstream = _operands((2, 20, 9, 2, 40), dtype)
    mask = _mask(2, 9)
    expected = _with_gradients(_fused, [q, k, v, upstream], mask)
    padding = ~mask[..., None, None]
    k, v = k.masked_fill(padding, torch.nan), v.masked_fill(padding, torch.inf)
    found = _with_gradients(_fused, [q, k, v, upstream], mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_without_keys_gives_zero_and_no_gradient(dtype: torch.dtype) -> None:
    operands, mask = _operands((3, 20, 9, 2, 40), dtype), _mask(3, 9)
    mask[1] = False
    for value in _with_gradients(_fused, operands, mask):
        assert torch.equal(value[1], torch.zeros_like(value[1]))
        assert value[0].abs().max() > 0
        assert value[2].abs().max() > 0


@pytest.mark.parametrize("size", [(0, 4, 3, 2, 8), (2, 0, 3, 2, 8), (2, 4, 3, 0, 8)], ids=str)
def test_empty_operands(size: tuple[int, ...]) -> None:
    operands = _operands(size)
    found = _with_gradients(_fused, operands)
    for value, like in zip(found, [operands[0], *operands[:3]], strict=True):
        assert value.shape == like.shape
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strides(dtype: torch.dtype) -> None:
    """Heads first, packed keys and values, sliced, every second channel, and one for all heads."""
    q, k, v, upstream = _operands((2, 20, 9, 2, 40), dtype)
    expected = _with_gradients(_fused, [q, k, v, upstream])
    packed = torch.stack((k, v), dim=3)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.stack((q, torch.full_like(q, torch.nan)), dim=-1)[..., 0]
    wide = torch.cat((upstream, torch.full_like(q, torch.nan)), dim=-1)[..., :40]
    for query in (heads_first, spread):
        found = _with_gradients(_fused, [query, packed[:, :, :, 0], packed[:, :, :, 1], wide])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    shared = k[:, :, :1].expand_as(k)
    assert torch.equal(_fused(q, shared, v, None), _fused(q, shared.contiguous(), v, None))


@pytest.mark.parametrize("stride", [(2**31, 16, 8, 1), (24, 2**31, 8, 1), (16, 8, 2**31, 1)])
def test_offsets_beyond_32_bits(stride: tuple[int, ...]) -> None:
    """Of queries and keys that lie far apart; the pages between them are never touched."""
    operands = _operands((2, 2, 2, 2, 8), torch.float16)
    expected = _with_gradients(_fused, operands)
    furthest = sum((size - 1) * step for size, step in zip((2, 2, 2, 8), stride, strict=True))
    assert furthest >= 2**31
    far = torch.empty(furthest + 1, dtype=torch.float16)
    for place in range(4):
        moved = list(operands)
        moved[place] = far.as_strided((2, 2, 2, 8), stride).copy_(operands[place])
        found = _with_gradients(_fused, moved)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lk", [7, 300])
def test_nan_and_infinity_go_where_torch_sends_them(lk: int) -> None:
    for place, value in [(0, torch.nan), (0, torch.inf), (1, torch.nan), (1, -torch.inf),
                         (2, torch.nan), (2, torch.inf)]:  # fmt: skip
        operands = _operands((1, 20, lk, 1, 8))
        operands[place][0, 3, 0, 2] = value
        expected, found = (
            function(*(operand.double() for operand in operands[:3]), None)
            if function is _plain
            else function(*operands[:3], None).double()
            for function in (_plain, _fused)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_nan_of_any_payload_stays_nan() -> None:
    """Its bits are no number's when an integer is added to them."""
    for payload in (0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1):
        q, k, v, _ = _operands((1, 3, 5, 1, 8))
        q[0, 1, 0, 0] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
        o = _fused(q, k, v, None)
        assert o[0, 1].isnan().all()
        assert o[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("lk", [7, 300])
@pytest.mark.parametrize("scale", [50.0, 3000.0])
def test_large_scores(lk: int, scale: float) -> None:
    """Softmax of scores in the thousands is that of their differences; most weights are 0."""
    q, k, v, _ = _operands((1, 20, lk, 1, 8))
    k[:, lk // 2] *= -1
    exact = _plain(q.double() * scale, k.double(), v.double(), None)
    plain = _plain(q * scale, k, v, None)
    found = _fused(q * scale, k, v, None)
    error, allowed = ((value - exact).abs().max() for value in (found, plain))
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("lk", [7, 300])
@pytest.mark.parametrize("scale", [-0.3, -4.0, 0.0, 1.5])
def test_any_scale(lk: int, scale: float, assert_accurate: Any) -> None:
    """The largest product has the smallest score where the scale is negative."""

    def plain(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
        return _plain(q * (scale * q.shape[-1] ** 0.5), k, v, None)

    def fused(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
        return ops.cross_attention(q, k, v, scale=scale)

    operands = _operands((2, 20, lk, 1, 16))
    exact = _with_gradients(plain, [value.double() for value in operands])
    same_dtype, found = (_with_gradients(function, operands) for function in (plain, fused))
    for got, as_torch, truth in zip(found, same_dtype, exact, strict=True):
        assert_accurate(got, as_torch, truth)


def test_weights_that_are_too_small_are_zero() -> None:
    """A value of any size that has no weight adds nothing."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, -200.0]).reshape(1, 2, 1, 1)
    v = torch.tensor([1.0, 3e38]).reshape(1, 2, 1, 1)
    assert _fused(q, k, v, None).item() == 1.0


def test_the_largest_score_comes_last_and_first() -> None:
    """Blocks are scaled to a maximum that grows, and that does not."""
    q, k, v, _ = _operands((1, 17, 600, 1, 8))
    for order in (k.mean(-1).argsort(1), k.mean(-1).argsort(1, descending=True)):
        key = (k.gather(1, order[..., None].expand_as(k)) * 20).contiguous()
        exact = _plain(q.double().abs(), key.double(), v.double(), None)
        torch.testing.assert_close(
            _fused(q.abs(), key, v, None).double(), exact, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("masked", [False, True])
def test_raw_operators(masked: bool) -> None:
    q, k, v, upstream = _operands((2, 5, 7, 2, 8))
    mask = _mask(2, 7) if masked else None
    torch.library.opcheck(
        torch.ops.fastldm.cross_attention_fwd.default, (q, k, v, 0.3, mask), {"backend": "cpp"}
    )
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            torch.ops.fastldm.cross_attention_bwd.default,
            (upstream, q, k, v, 0.3, mask, wanted),
            {"backend": "cpp"},
        )


def test_second_derivatives() -> None:
    operands = _operands((1, 4, 3, 1, 8))[:3]

    def second(function: Callable[..., Tensor], values: Operands) -> Operands:
        leaves = [value.detach().requires_grad_() for value in values]
        o = function(*leaves, None)
        (first,) = torch.autograd.grad(o.square().sum(), leaves[0], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), leaves))

    exact = second(_plain, [value.double() for value in operands])
    for actual, truth in zip(second(_fused, operands), exact, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-5)


def test_which_calls_it_serves() -> None:
    q, k, v, _ = _operands((1, 4, 3, 1, 8))
    wide, many = torch.zeros(1, 4, 1, 320), torch.zeros(1, 300, 1, 320)
    with ops.backend("auto"):
        assert _dispatch.choose("cross_attention", q, k, v) == "cpp"
        assert _dispatch.choose("cross_attention", wide, wide, wide) == "cpp"
        assert _dispatch.choose("cross_attention", wide, many, many) == "reference"
        assert _dispatch.choose("cross_attention", *(t.double() for t in (q, k, v))) == "reference"
    assert _dispatch.choose("cross_attention", wide, many, many) == "cpp"
    with pytest.raises(BackendUnavailableError, match=r"no kernel for q of torch\.float64"):
        ops.cross_attention(*(t.double() for t in (q, k, v)))
