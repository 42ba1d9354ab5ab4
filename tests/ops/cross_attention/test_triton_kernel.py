"""The Triton kernels of cross_attention, in the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from fastldm import ops
from fastldm.ops.cross_attention import plan

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Queries, keys, heads and channels of a head: 77 tokens for the UNets of Stable Diffusion 1, 2 and
# XL and of the text-to-image model, two captions' for XL, 92 for layouts, one for a class; and some
# that no model has.
MODELS = [
    (9, 77, 2, 40), (7, 77, 2, 80), (4, 77, 2, 160), (9, 77, 3, 64), (1, 77, 2, 40),
    (6, 154, 1, 64), (8, 92, 2, 32), (5, 92, 1, 160), (6, 1, 1, 64), (6, 1, 1, 32),
    (3, 77, 1, 128), (4, 256, 1, 160), (5, 16, 2, 8), (5, 20, 1, 48), (5, 33, 1, 72),
    (5, 12, 1, 96), (5, 5, 1, 3), (4, 9, 1, 100),
]  # fmt: skip
Operands = list[Tensor]


@pytest.fixture(autouse=True)
def _products_of_bfloat16(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16, as if they were integers."""
    if triton_device == "cuda":
        return
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few queries to a block that a short sequence takes several, and a split."""
    monkeypatch.setattr(plan, "_MOST_ROWS", 16)


def _operands(
    batch: int, lq: int, lk: int, heads: int, width: int, dtype: torch.dtype, device: str
) -> Operands:
    generator = torch.Generator().manual_seed(lq + lk + width)
    return [
        torch.randn(batch, n, heads, width, generator=generator).to(device, dtype)
        for n in (lq, lk, lk)
    ]


def _mask(batch: int, lk: int, device: str) -> Tensor:
    """Captions of every length: all keys, then fewer, then one; with a hole."""
    lengths = torch.linspace(lk, 1, batch).long()
    mask = torch.arange(lk)[None] < lengths[:, None]
    mask[0, lk // 3] = lk == 1
    return mask.to(device)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Unfused attention in the operands' dtype."""
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (F.softmax(scores, -1) @ v.transpose(1, 2)).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    with ops.backend("triton"):
        return ops.cross_attention(q, k, v, scale=scale, key_mask=mask)


def _with_gradients(
    function: Callable[..., Tensor],
    operands: Operands,
    upstream: Tensor,
    scale: float | None,
    mask: Tensor | None,
) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in operands]
    out = function(*leaves, scale, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _compare(
    operands: Operands,
    mask: Tensor | None,
    assert_accurate: Any,
    *,
    scale: float | None = None,
    arranged: Callable[[Tensor], Tensor] = Tensor.clone,
) -> None:
    """Output and every gradient, with the operands and the upstream gradient rearranged."""
    q = operands[0]
    upstream = torch.randn(q.shape).to(q.device, q.dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    exact = _with_gradients(_plain, [t.double() for t in operands], upstream, factor, mask)
    plain = _with_gradients(_plain, operands, upstream, factor, mask)
    given = [arranged(value) for value in operands]
    actual = _with_gradients(_fused, given, arranged(upstream), scale, mask)
    assert actual[0].is_contiguous()
    for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert got.dtype == q.dtype
        assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lq", "lk", "heads", "width"), MODELS)
def test_shapes_of_the_models(
    lq: int, lk: int, heads: int, width: int, dtype: torch.dtype, assert_accurate: Any,
    triton_device: str,
) -> None:  # fmt: skip
    operands = _operands(2, lq, lk, heads, width, dtype, triton_device)
    mask = _mask(2, lk, triton_device) if width % 16 else None
    _compare(operands, mask, assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lk", "masked"),
    [(1, True), (2, False), (16, True), (64, False), (77, False), (77, True), (128, True),
     (154, True), (231, False), (256, True)],
)  # fmt: skip
def test_numbers_of_keys(
    lk: int, masked: bool, dtype: torch.dtype, assert_accurate: Any, triton_device: str
) -> None:
    operands = _operands(2, 5, lk, 1, 40, dtype, triton_device)
    _compare(operands, _mask(2, lk, triton_device) if masked else None, assert_accurate)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 8, 1000], ids=lambda n: f"{n} programs")
def test_queries_in_blocks_and_splits(
    programs: int,
    dtype: torch.dtype,
    assert_accurate: Any,
    triton_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_FORWARD_WARPS", 8 * programs)
    monkeypatch.setattr(plan, "_BACKWARD_WARPS", 8 * programs)
    operands = _operands(2, 70, 20, 1, 24, dtype, triton_device)
    for cut in (plan.forward, plan.backward):
        assert (cut(2, 70, 1, 20, 24, dtype).splits > 1) == (programs > 1)
    _compare(operands, _mask(2, 20, triton_device), assert_accurate)


@pytest.mark.parametrize("scale", [0.0, 2.0, -0.7])
def test_scales(scale: float, assert_accurate: Any, triton_device: str) -> None:
    """Among them the one that makes all scores the same."""
    operands = _operands(2, 5, 7, 2, 16, torch.float32, triton_device)
    _compare(operands, _mask(2, 7, triton_device), assert_accurate, scale=scale)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _out_of_a_packed_projection(x: Tensor) -> Tensor:
    """Between others along the channels, as one matrix product for q, k and v gives it."""
    nan = torch.full_like(x, torch.nan)
    return torch.cat((nan, x, nan), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]


def _every_second_row(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=2).flatten(1, 2)[:, ::2]


def _channels_outermost(x: Tensor) -> Tensor:
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def _not_at_a_vector(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "arranged",
    [_heads_first, _out_of_a_packed_projection, _every_second_row, _channels_outermost,
     _not_at_a_vector],
)  # fmt: skip
def test_strides(
    arranged: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    assert_accurate: Any,
    triton_device: str,
) -> None:
    operands = _operands(2, 9, 20, 2, 40, dtype, triton_device)
    mask = _mask(2, 40, triton_device)[:, ::2]
    _compare(operands, mask, assert_accurate, arranged=arranged)


def test_one_caption_for_all_samples(assert_accurate: Any, triton_device: str) -> None:
    """Keys and values of stride 0, and the gradient of a sum."""
    q, k, v = _operands(3, 5, 7, 2, 16, torch.float32, triton_device)
    k, v = (t[:1].expand_as(t) for t in (k, v))
    exact = _plain(q.double(), k.double(), v.double(), 0.25, None)
    assert_accurate(_fused(q, k, v, None, None), _plain(q, k, v, 0.25, None), exact)
    leaf, wide = q.clone().requires_grad_(), q.double().requires_grad_()
    _fused(leaf, k, v, None, None).sum().backward()
    _plain(wide, k.double(), v.double(), 0.25, None).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch", "lq"), [(0, 4), (2, 0)])
def test_nothing_to_attend_from(batch: int, lq: int, triton_device: str) -> None:
    operands = _operands(batch, lq, 3, 2, 8, torch.float16, triton_device)
    upstream = torch.zeros_like(operands[0])
    o, *gradients = _with_gradients(_fused, operands, upstream, None, None)
    assert o.shape == (batch, lq, 2, 8)
    for gradient, value in zip(gradients, operands, strict=True):
        assert torch.equal(gradient, torch.zeros_like(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_without_keys_gives_zero_and_no_gradient(
    dtype: torch.dtype, triton_device: str
) -> None:
    operands = _operands(3, 5, 20, 1, 8, dtype, triton_device)
    mask = _mask(3, 20, triton_device)
    mask[1] = False
    upstream = torch.randn(3, 5, 1, 8).to(triton_device)
    for result in _with_gradients(_fused, operands, upstream, None, mask):
        assert torch.equal(result[1], torch.zeros_like(result[1]))
        assert result.isfinite().all()
        assert result[0].abs().max() > 0


def test_masked_keys_are_not_read(triton_device: str) -> None:
    """Whatever padding holds, NaN included, it changes nothing."""
    operands = _operands(3, 5, 20, 2, 8, torch.float32, triton_device)
    mask, upstream = _mask(3, 20, triton_device), torch.randn(3, 5, 2, 8).to(triton_device)
    expected = _with_gradients(_fused, operands, upstream, None, mask)
    padding = ~mask[..., None, None]
    padded = [operands[0], *(t.masked_fill(padding, torch.nan) for t in operands[1:])]
    found = _with_gradients(_fused, padded, upstream, None, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for gradient in found[2:]:
        assert not gradient.masked_select(padding).any()


@pytest.mark.parametrize("factor", [5, 40])
def test_scores_far_apart(factor: float, assert_accurate: Any, triton_device: str) -> None:
    """exp of no score overflows, and of all but one in a row nothing is left."""
    q, k, v = _operands(1, 5, 20, 1, 16, torch.float32, triton_device)
    _compare([factor * q, factor * k, v], None, assert_accurate)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_values_go_where_torch_sends_them(
    name: str, value: float, triton_device: str
) -> None:
    operands = _operands(2, 4, 7, 2, 8, torch.float32, triton_device)
    operands["qkv".index(name)][1, 2, 0, 3] = value
    upstream = torch.randn(2, 4, 2, 8).to(triton_device)
    found, expected = (
        _with_gradients(f, operands, upstream, 0.3, None) for f in (_fused, _plain)
    )  # fmt: skip
    for actual, same in zip(found, expected, strict=True):
        assert torch.equal(actual.isfinite(), same.isfinite())
        assert actual[0].isfinite().all()


def test_half_precision_near_overflow(assert_accurate: Any, triton_device: str) -> None:
    """Scores beyond the range of float16 that their scale brings back."""
    q, k, v = _operands(1, 4, 7, 1, 64, torch.float16, triton_device)
    q, k, v = 200 * q, 200 * k, (3e4 * v).clamp(-6e4, 6e4)
    exact = _plain(q.double(), k.double(), v.double(), 1e-6, None)
    plain = _plain(q.float(), k.float(), v.float(), 1e-6, None).half()
    assert torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).abs().max() > 7e4
    assert_accurate(_fused(q, k, v, 1e-6, None), plain, exact)


@pytest.mark.usefixtures("guarded_memory", "small_blocks")
@pytest.mark.parametrize("width", [24, 40])
def test_every_element_is_written_and_nothing_else(width: int, triton_device: str) -> None:
    operands = _operands(2, 19, 21, 2, width, torch.float16, triton_device)
    mask, upstream = _mask(2, 21, triton_device), torch.randn(2, 19, 2, width).to(triton_device)
    for result in _with_gradients(_fused, operands, upstream, None, mask):
        assert result.isfinite().all()


def test_the_same_keys_have_the_same_weight(triton_device: str) -> None:
    q, k, v = _operands(2, 5, 21, 2, 16, torch.float32, triton_device)
    o = _fused(q, k[:, :1].expand_as(k), v, None, None)
    torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(o), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
def test_some_gradients_only(wanted: list[int], triton_device: str) -> None:
    operands = _operands(2, 40, 21, 2, 24, torch.float32, triton_device)
    upstream = torch.randn(2, 40, 2, 24).to(triton_device)
    expected = _with_gradients(_fused, operands, upstream, None, None)[1:]
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(operands)]
    o = _fused(*leaves, None, None)
    found = torch.autograd.grad(o, [leaves[i] for i in wanted], upstream)
    assert all(torch.equal(g, expected[i]) for g, i in zip(found, wanted, strict=True))


def test_under_autocast(triton_device: str) -> None:
    operands = _operands(2, 5, 7, 2, 16, torch.float32, triton_device)
    half = _fused(*(x.bfloat16() for x in operands), None, None)
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        o = _fused(*operands, None, None)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, half)


@pytest.mark.usefixtures("small_blocks")
def test_runs_are_bit_equal(triton_device: str) -> None:
    operands = _operands(2, 40, 21, 2, 24, torch.float32, triton_device)
    upstream = torch.randn(2, 40, 2, 24).to(triton_device)
    first, second = (_with_gradients(_fused, operands, upstream, None, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives(triton_device: str) -> None:
    operands = _operands(1, 3, 4, 1, 5, torch.float32, triton_device)

    def second(function: Callable[..., Tensor], values: Operands) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in values]
        o = function(*leaves, 0.5, None)
        (first,) = torch.autograd.grad(o.square().sum(), leaves[0], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), leaves))

    exact = second(_plain, [value.double() for value in operands])
    for actual, truth in zip(second(_fused, operands), exact, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-5)


def test_compiled_once_for_every_size(triton_device: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.cross_attention, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    with ops.backend("triton"):
        for lq, lk in [(6, 7), (9, 5), (17, 20)]:
            operands = _operands(2, lq, lk, 2, 8, torch.float32, triton_device)
            leaves = [value.requires_grad_() for value in operands]
            mask, upstream = _mask(2, lk, triton_device), torch.randn_like(operands[0])
            pair = [f(*leaves, key_mask=mask) for f in (ops.cross_attention, compiled)]
            assert torch.equal(*pair)
            found = (torch.autograd.grad(o, leaves, upstream) for o in pair)
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 3


class _Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ops.cross_attention(q, k, v, key_mask=mask)


def test_exported_for_every_size(triton_device: str) -> None:
    lengths = {"q": {1: torch.export.Dim("lq")}, "k": {1: torch.export.Dim("lk", min=2, max=256)}}
    lengths |= {"v": lengths["k"], "mask": lengths["k"]}
    example = (*_operands(2, 6, 7, 2, 8, torch.float32, triton_device), _mask(2, 7, triton_device))
    with ops.backend("triton"):
        program = torch.export.export(_Attend(), example, dynamic_shapes=lengths)
    assert "fastldm.cross_attention_fwd" in program.graph_module.code
    other = (*_operands(2, 9, 20, 2, 8, torch.float32, triton_device), _mask(2, 20, triton_device))
    assert torch.equal(program.module()(*other), _fused(*other[:3], None, other[3]))


@pytest.mark.parametrize(
    "stride", [(2**31, 16, 8, 1), (24, 2**31, 8, 1), (16, 8, 2**31, 1)], ids=str
)
def test_offsets_beyond_32_bits(
    stride: tuple[int, ...], triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of queries and keys that lie far apart; the pages between them are never touched."""
    if triton_device == "cpu":
        # It would copy every argument's storage onto itself.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    q, k, v = _operands(2, 2, 2, 2, 8, torch.float16, triton_device)
    expected = _with_gradients(_fused, [q, k, v], q, None, None)
    furthest = sum((size - 1) * step for size, step in zip(q.shape, stride, strict=True))
    assert furthest >= 2**31
    far = torch.empty(furthest + 1, dtype=torch.float16, device=triton_device)
    for place in (0, 1):
        operands = [q, k, v]
        operands[place] = far.as_strided(q.shape, stride).copy_(operands[place])
        found = _with_gradients(_fused, operands, q, None, None)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
