"""The Triton kernels of group_norm_silu, in the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops
from fastldm.ops.group_norm_silu import plan

pytest.importorskip("triton")

from fastldm.ops.group_norm_silu.triton_tiles import pixel_strides

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = ["contiguous", "channels_last", "sliced", "channels_last sliced"]
AFFINE = ("weight", "bias")
EVERY_OPTION = (*AFFINE, "channel_add", "residual", "scale", "shift")
# Of the UNets and autoencoders of latent diffusion and Stable Diffusion, concatenations included.
CHANNELS = [
    128, 160, 192, 224, 256, 320, 384, 448, 480, 512, 576, 640, 672, 768, 800, 896, 960, 1024, 1120,
    1152, 1280, 1344, 1536, 1792, 1920, 2048, 2560,
]  # fmt: skip
Operands = dict[str, Tensor]


@pytest.fixture(params=["whole", "in pieces"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Groups that fit on chip, and tiles so small that all is split, over pixels and channels."""
    if request.param == "in pieces":
        small = {"elements": 128, "block_c": 16, "work": 256, "programs": 1, "num_warps": 1}
        monkeypatch.setattr(plan, "_configs", lambda device: _Everywhere(small))
        combining = plan.combining
        monkeypatch.setattr(plan, "split", plan.split.__wrapped__)
        monkeypatch.setattr(plan, "combining", lambda *sizes: (2, combining(*sizes)[1]))
        monkeypatch.setattr(plan, "whole", lambda *_: None)
    return str(request.param)


class _Everywhere(dict[str, Any]):
    """The same configuration for every kernel."""

    def __getitem__(self, kernel: str) -> dict[str, int]:
        return dict(self)


def _operands(
    shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype, device: str
) -> Operands:
    generator = torch.Generator().manual_seed(sum(shape) + len(names))
    shapes = {"weight": shape[1:2], "bias": shape[1:2], "residual": shape, "x": shape}
    return {
        name: torch.randn(shapes.get(name, shape[:2]), generator=generator).to(device, dtype)
        for name in ("x", *names)
    }


def _plain(operands: Operands, groups: int, activation: str | None) -> Tensor:
    """The composition that the operator replaces."""

    def expanded(name: str) -> Tensor:
        value, x = operands[name], operands["x"]
        return value.reshape(*value.shape, *(1,) * (x.ndim - 2))

    h = operands["x"]
    if "channel_add" in operands:
        h = h + expanded("channel_add")
    if "residual" in operands:
        h = h + operands["residual"]
    n = F.group_norm(h, groups, operands.get("weight"), operands.get("bias"), 1e-5)
    if "scale" in operands:
        n = n * (1 + expanded("scale"))
    if "shift" in operands:
        n = n + expanded("shift")
    return n if activation is None else F.silu(n)


def _fused(operands: Operands, groups: int, activation: str | None) -> Tensor:
    others = {name: value for name, value in operands.items() if name != "x"}
    with ops.backend("triton"):
        return ops.group_norm_silu(
            operands["x"],
            groups,
            activation=activation,
            **others,  # type: ignore[arg-type]
        )


def _with_gradients(
    function: Callable[[Operands, int, str | None], Tensor],
    operands: Operands,
    upstream: Tensor,
    groups: int,
    activation: str | None,
) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    y = function(leaves, groups, activation)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))]


def _compare(
    operands: Operands,
    groups: int,
    activation: str | None,
    assert_accurate: Any,
    arranged: Callable[[Tensor], Tensor] = Tensor.clone,
) -> None:
    """Output and every gradient, with x and residual rearranged for the kernel."""
    x = operands["x"]
    upstream = torch.randn(x.shape).to(x.device, x.dtype)
    wide = {name: value.double() for name, value in operands.items()}
    exact = _with_gradients(_plain, wide, upstream, groups, activation)
    plain = _with_gradients(_plain, operands, upstream, groups, activation)
    given = {
        name: arranged(value) if name in ("x", "residual") else value
        for name, value in operands.items()
    }
    actual = _with_gradients(_fused, given, upstream, groups, activation)
    for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert got.dtype == x.dtype
        assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_every_gradient(
    dtype: torch.dtype,
    layout: str,
    tiling: str,
    laid_out: Any,
    assert_accurate: Any,
    triton_device: str,
) -> None:
    operands = _operands((2, 12, 5, 3), EVERY_OPTION, dtype, triton_device)
    _compare(operands, 4, "silu", assert_accurate, lambda x: laid_out(x, layout))


@pytest.mark.parametrize("names", [(), AFFINE, ("bias", "scale"), ("channel_add",)])
@pytest.mark.parametrize("activation", ["silu", None])
def test_options(
    names: tuple[str, ...],
    activation: str | None,
    tiling: str,
    laid_out: Any,
    assert_accurate: Any,
    triton_device: str,
) -> None:
    operands = _operands((2, 12, 5, 3), names, torch.float32, triton_device)
    _compare(operands, 4, activation, assert_accurate, lambda x: laid_out(x, "channels_last"))


@pytest.mark.parametrize(
    ("channels", "layout"),
    [(channels, "channels_last") for channels in CHANNELS]
    + [(channels, "contiguous") for channels in (128, 224, 320, 960, 2560)],
)
def test_channels_of_the_models(
    channels: int, layout: str, laid_out: Any, assert_accurate: Any, triton_device: str
) -> None:
    operands = _operands((1, channels, 3, 2), AFFINE, torch.bfloat16, triton_device)
    _compare(operands, 32, "silu", assert_accurate, lambda x: laid_out(x, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [160, 320])
def test_channels_in_tiles_that_end_inside_groups(
    channels: int,
    layout: str,
    laid_out: Any,
    assert_accurate: Any,
    triton_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "whole", lambda *_: None)
    operands = _operands((1, channels, 7, 5), AFFINE, torch.float16, triton_device)
    _compare(operands, 32, "silu", assert_accurate, lambda x: laid_out(x, layout))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 1, 1), 3), ((3, 6), 3), ((2, 6), 6), ((2, 6, 7), 2), ((1, 8, 2, 3, 2), 4),
     ((1, 15, 3, 3), 5), ((2, 3, 9, 9), 1), ((1, 7, 4, 4), 7), ((1, 60, 3, 3), 6),
     ((9, 4, 3), 2)],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shapes(
    shape: tuple[int, ...],
    groups: int,
    layout: str,
    tiling: str,
    laid_out: Any,
    assert_accurate: Any,
    triton_device: str,
) -> None:
    # In float32 the error of so few sums is a matter of luck, plain PyTorch's, too.
    operands = _operands(shape, EVERY_OPTION, torch.float16, triton_device)
    _compare(operands, groups, "silu", assert_accurate, lambda x: laid_out(x, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_samples(layout: str, tiling: str, laid_out: Any, triton_device: str) -> None:
    operands = _operands((0, 8, 3, 3), EVERY_OPTION, torch.float32, triton_device)
    operands["x"] = laid_out(operands["x"], layout)
    y, *gradients = _with_gradients(_fused, operands, operands["residual"], 4, "silu")
    assert y.shape == (0, 8, 3, 3)
    for gradient, value in zip(gradients, operands.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(value))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pixels_that_are_not_evenly_spaced(
    layout: str, laid_out: Any, assert_accurate: Any, triton_device: str
) -> None:
    operands = _operands((2, 8, 4, 3), EVERY_OPTION, torch.float32, triton_device)

    def every_second(x: Tensor) -> Tensor:
        wide = laid_out(x.new_full((*x.shape[:2], 4, 6), torch.nan), layout)
        return wide[..., ::2].copy_(x)

    _compare(operands, 2, "silu", assert_accurate, every_second)


def test_operands_in_different_layouts_and_strided_rows(
    laid_out: Any, assert_accurate: Any, triton_device: str
) -> None:
    operands = _operands((2, 8, 4, 3), EVERY_OPTION, torch.float32, triton_device)
    exact = _plain({name: value.double() for name, value in operands.items()}, 2, "silu")
    plain = _plain(operands, 2, "silu")
    operands["x"] = laid_out(operands["x"], "channels_last")
    both = torch.cat([operands["scale"], operands["shift"]], dim=1)
    operands["scale"], operands["shift"] = both.chunk(2, dim=1)
    operands["channel_add"] = operands["channel_add"].t().contiguous().t()
    operands["weight"] = operands["weight"].repeat_interleave(2)[::2]
    assert_accurate(_fused(operands, 2, "silu"), plain, exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [100.0, 4000.0])
def test_mean_far_above_the_deviation(
    layout: str, ratio: float, tiling: str, laid_out: Any, triton_device: str
) -> None:
    x = torch.randn(2, 32, 16, 16, device=triton_device) + ratio
    # A mean far from the first pixel, too: a shift by it would not do.
    x[:, :, 0, 0] = 0
    exact = _plain({"x": x.double()}, 2, None)
    actual = _fused({"x": laid_out(x, layout)}, 2, None).double()
    assert (actual - exact).abs().max() <= 2 * ratio * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.0, 3.1, -60000.0, 1e12])
def test_constant_input(
    layout: str, value: float, tiling: str, laid_out: Any, triton_device: str
) -> None:
    """A constant has no variance: what is left is the bias."""
    operands = _operands((1, 8, 5, 5), AFFINE, torch.float32, triton_device)
    x = laid_out(torch.full((1, 8, 5, 5), value, device=triton_device), layout)
    y = _fused({**operands, "x": x}, 2, None)
    expected = operands["bias"][None, :, None, None].expand_as(y)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_values_stay_in_their_group(
    value: float, layout: str, tiling: str, laid_out: Any, triton_device: str
) -> None:
    x = torch.randn(2, 8, 3, 3, device=triton_device)
    x[1, 2, 0, 0] = value
    upstream = torch.randn_like(x)
    found = _with_gradients(_fused, {"x": laid_out(x, layout)}, upstream, 4, "silu")
    expected = _with_gradients(_plain, {"x": x}, upstream, 4, "silu")
    for actual, same in zip(found, expected, strict=True):
        assert torch.equal(actual.isfinite(), same.isfinite())
        assert not actual[1, 2:4].isfinite().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_precision_near_overflow(
    layout: str, tiling: str, laid_out: Any, assert_accurate: Any, triton_device: str
) -> None:
    x = (torch.randn(1, 8, 4, 4).clamp(-1, 1) * 60000).half().to(triton_device)
    exact = _plain({"x": x.double()}, 2, "silu")
    plain = _plain({"x": x}, 2, "silu")
    assert_accurate(_fused({"x": laid_out(x, layout)}, 2, "silu"), plain, exact)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 24, 5, 3), 4), ((1, 40, 1, 1), 4), ((1, 60, 3, 3), 6)]
)
def test_every_element_is_written_and_nothing_else(
    shape: tuple[int, ...], groups: int, layout: str, tiling: str, laid_out: Any, triton_device: str
) -> None:
    operands = _operands(shape, EVERY_OPTION, torch.float16, triton_device)
    operands["x"] = laid_out(operands["x"], layout)
    upstream = torch.randn(shape).to(triton_device)
    for result in _with_gradients(_fused, operands, upstream, groups, "silu"):
        assert result.isfinite().all()


def test_runs_are_bit_equal(tiling: str, triton_device: str) -> None:
    operands = _operands((2, 24, 5, 3), EVERY_OPTION, torch.float32, triton_device)
    upstream = torch.randn(2, 24, 5, 3).to(triton_device)
    first, second = (_with_gradients(_fused, operands, upstream, 4, "silu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_some_gradients_only(tiling: str, triton_device: str) -> None:
    operands = _operands((2, 8, 3, 3), EVERY_OPTION, torch.float32, triton_device)
    upstream = torch.randn(2, 8, 3, 3).to(triton_device)
    _, *expected = _with_gradients(_fused, operands, upstream, 2, "silu")
    for (name, value), gradient in zip(operands.items(), expected, strict=True):
        leaf = value.detach().requires_grad_()
        y = _fused({**operands, name: leaf}, 2, "silu")
        (alone,) = torch.autograd.grad(y, leaf, upstream)
        assert torch.equal(alone, gradient), name


def test_second_derivatives(triton_device: str) -> None:
    operands = _operands((1, 4, 3, 2), EVERY_OPTION, torch.float32, triton_device)

    def second(function: Callable[..., Tensor], values: Operands) -> list[Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        y = function(leaves, 2, "silu")
        first = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)[0]
        return list(torch.autograd.grad(first.square().sum(), list(leaves.values())))

    exact = second(_plain, {name: value.double() for name, value in operands.items()})
    for actual, truth in zip(second(_fused, operands), exact, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-4)


def test_mixed_dtypes(triton_device: str) -> None:
    """float32 weights beside a bfloat16 input, as mixed precision has them."""
    operands = _operands((2, 8, 3, 3), EVERY_OPTION, torch.float32, triton_device)
    operands["x"], operands["residual"] = operands["x"].bfloat16(), operands["residual"].bfloat16()
    operands["channel_add"] = operands["channel_add"].half()
    upstream = torch.randn(2, 8, 3, 3).to(triton_device)
    found = _with_gradients(_fused, operands, upstream, 2, "silu")
    wide = {name: value.double() for name, value in operands.items()}
    exact = _with_gradients(_plain, wide, upstream.bfloat16(), 2, "silu")
    for result, operand, truth in zip(
        found, (operands["x"], *operands.values()), exact, strict=True
    ):
        assert result.dtype == operand.dtype
        eps = torch.finfo(operand.dtype).eps
        torch.testing.assert_close(result.double(), truth, rtol=eps, atol=4e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_without_a_graph_break(layout: str, laid_out: Any, triton_device: str) -> None:
    torch._dynamo.reset()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 4, weight)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.backend("triton"):
        for shape in [(2, 8, 4, 6), (1, 8, 5, 7)]:
            x = laid_out(torch.randn(shape).to(triton_device), layout).requires_grad_()
            weight = torch.randn(8, device=triton_device, requires_grad=True)
            upstream = torch.randn(shape).to(triton_device)
            expected, actual = function(x, weight), compiled(x, weight)
            assert torch.equal(actual, expected)
            assert actual.stride() == expected.stride()
            pair = (torch.autograd.grad(y, (x, weight), upstream) for y in (expected, actual))
            assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((3, 4, 2, 2), (2**30, 4, 2, 1)),
        ((3, 4, 2, 2), (2**30, 1, 8, 4)),
        ((1, 4, 2, 2), (16, 2**30, 2, 1)),
        ((1, 4, 2, 2), (16, 4, 2**31, 2**30)),
        ((1, 2, 160), (16, 4, 2**31 // 95)),
    ],
    ids=str,
)
def test_offsets_beyond_32_bits(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    tiling: str,
    triton_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a tensor whose elements lie far apart; the pages between them are never touched."""
    if triton_device == "cpu":
        from triton.runtime import interpreter

        # It would copy every argument's storage onto itself.
        monkeypatch.setattr(
            interpreter.GridExecutor, "_restore_args_dev", lambda *_: None
        )  # fmt: skip
    # Most strides fit into 32 bits, the offsets do not.
    furthest = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    assert furthest >= 2**31
    x = torch.empty(furthest + 1, dtype=torch.float16, device=triton_device)
    x = x.as_strided(shape, stride).copy_(torch.randn(shape))
    assert pixel_strides(x) is not None, "the kernel gets a dense copy"
    dense = x.clone(memory_format=torch.contiguous_format)
    upstream = torch.randn(shape).to(triton_device, torch.float16)
    found = _with_gradients(_fused, {"x": x}, upstream, 2, "silu")
    expected = _with_gradients(_fused, {"x": dense}, upstream, 2, "silu")
    for far, near in zip(found, expected, strict=True):
        torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)
