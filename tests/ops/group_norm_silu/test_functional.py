"""group_norm_silu against float64, its gradients of both orders, layouts, compilation, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import group_norm_silu

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["contiguous", "channels_last", "sliced", "channels_last sliced"]
EVERY_OPTION = ("weight", "bias", "channel_add", "residual", "scale", "shift")
Operands = dict[str, Tensor]
_PATHS = pytest.mark.parametrize("path", ["formula", "raw", "cpp"], indirect=True)


def every_path(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test by the reference's formula, by its raw operators and by the C++ kernels."""
    return pytest.mark.usefixtures("path")(_PATHS(test))


def _operands(shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype) -> Operands:
    generator = torch.Generator().manual_seed(sum(shape) + len(names))
    shapes = {"weight": shape[1:2], "bias": shape[1:2], "residual": shape, "x": shape}
    return {
        name: torch.randn(shapes.get(name, shape[:2]), generator=generator).to(dtype)
        for name in ("x", *names)
    }


def _expand(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(*value.shape, *(1,) * (x.ndim - 2))


def _naive(operands: Operands, groups: int, activation: str | None, plain: bool) -> Tensor:
    """The composition that the operator replaces; its norm by torch, or term by term."""
    x, weight, bias = operands["x"], operands.get("weight"), operands.get("bias")
    h = x
    if "channel_add" in operands:
        h = h + _expand(operands["channel_add"], x)
    if "residual" in operands:
        h = h + operands["residual"]
    if plain:
        n = F.group_norm(h, groups, weight, bias, 1e-5)
    else:
        grouped = h.reshape(h.shape[0], groups, math.prod(h.shape[1:]) // groups)
        centred = grouped - grouped.mean(2, keepdim=True)
        normal = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
        n = normal.reshape(h.shape)
        n = n if weight is None else n * _expand(weight, h)
        n = n if bias is None else n + _expand(bias, h)
    if "scale" in operands:
        n = n * (1 + _expand(operands["scale"], x))
    if "shift" in operands:
        n = n + _expand(operands["shift"], x)
    return n * n.sigmoid() if activation else n


def _fused(operands: Operands, groups: int, activation: str | None) -> Tensor:
    others = {name: value for name, value in operands.items() if name != "x"}
    return group_norm_silu(operands["x"], groups, activation=activation, **others)  # type: ignore[arg-type]


def _with_gradients(
    function: Callable[[Operands], Tensor], operands: Operands, upstream: Tensor
) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    y = function(leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))]


@every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [(), ("weight", "bias"), EVERY_OPTION], ids=len)
@pytest.mark.parametrize("activation", ["silu", None])
def test_output_and_every_gradient(
    dtype: torch.dtype,
    layout: str,
    names: tuple[str, ...],
    activation: str | None,
    laid_out: Any,
    assert_accurate: Any,
) -> None:
    operands = _operands((2, 24, 5, 3), names, dtype)
    upstream = torch.randn(2, 24, 5, 3).to(dtype)
    wide = {name: value.double() for name, value in operands.items()}
    exact = _with_gradients(lambda o: _naive(o, 4, activation, False), wide, upstream)
    for name in ("x", "residual"):
        if name in operands:
            operands[name] = laid_out(operands[name], layout)
    # In the same layout: ATen adds in another order in each, and its error is the yardstick.
    plain = _with_gradients(lambda o: _naive(o, 4, activation, True), operands, upstream)
    actual = _with_gradients(lambda o: _fused(o, 4, activation), operands, upstream)
    for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert got.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)
        else:
            assert_accurate(got, same_dtype, truth)


@every_path
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 320, 3, 3), 32), ((3, 6), 3), ((2, 6, 7), 2), ((1, 8, 2, 3, 2), 4), ((2, 12, 1, 1), 4),
     ((2, 4, 1, 1), 4), ((0, 8, 3, 3), 2),
     # More pixels than C++ takes at once, in either layout.
     ((2, 8, 51, 47), 2), ((1, 2048, 9, 5), 32)],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shapes(shape: tuple[int, ...], groups: int, layout: str, laid_out: Any) -> None:
    operands = _operands(shape, EVERY_OPTION, torch.float64)
    upstream = torch.randn(shape, dtype=torch.float64)
    exact = _with_gradients(lambda o: _naive(o, groups, "silu", False), operands, upstream)
    operands["x"] = laid_out(operands["x"], layout)
    actual = _with_gradients(lambda o: _fused(o, groups, "silu"), operands, upstream)
    for got, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10, equal_nan=True)


@every_path
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_kept(layout: str, laid_out: Any) -> None:
    x = laid_out(torch.randn(2, 8, 3, 5), layout).requires_grad_()
    y = group_norm_silu(x, 2)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    expected = torch.channels_last if "channels_last" in layout else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)
    assert dx.is_contiguous(memory_format=expected)


@every_path
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [100.0, 4000.0])
def test_mean_far_above_the_deviation(layout: str, ratio: float, laid_out: Any) -> None:
    """One pass of E[x²] − E[x]² would lose every digit here."""
    x = laid_out(torch.randn(2, 32, 16, 16) + ratio, layout)
    exact = _naive({"x": x.double()}, 8, None, False)
    actual = group_norm_silu(x, 8, activation=None).double()
    # Rounding the mean itself, to half an ulp of the input, is what float32 cannot avoid.
    assert (actual - exact).abs().max() <= 4 * ratio * torch.finfo(torch.float32).eps


@every_path
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nonfinite_values_stay_in_their_group(value: float, layout: str, laid_out: Any) -> None:
    x = torch.randn(2, 8, 3, 3)
    x[1, 2, 0, 0] = value
    finite = group_norm_silu(laid_out(x, layout), 4).isfinite()
    assert torch.equal(finite, F.silu(F.group_norm(x, 4)).isfinite())
    assert not finite[1, 2:4].any()


@every_path
def test_half_precision_near_overflow() -> None:
    x = torch.randn(1, 8, 4, 4).clamp(-1, 1).half() * 60000
    exact = _naive({"x": x.double()}, 2, "silu", False)
    torch.testing.assert_close(group_norm_silu(x, 2).double(), exact, rtol=2e-3, atol=2e-3)


@every_path
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_of_both_orders(layout: str, laid_out: Any) -> None:
    operands = _operands((2, 4, 2, 2), EVERY_OPTION, torch.float64)
    operands["x"] = laid_out(operands["x"], layout)
    leaves = [value.requires_grad_() for value in operands.values()]

    def function(*values: Tensor) -> Tensor:
        return _fused(dict(zip(operands, values, strict=True)), 2, "silu")

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@every_path
def test_one_tensor_as_input_and_residual() -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: group_norm_silu(x, 2, residual=x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: group_norm_silu(x, 2, residual=x), (x,))


@every_path
def test_some_gradients_only() -> None:
    x, weight, scale = torch.randn(2, 4, 3, 3), torch.randn(4), torch.randn(2, 4)
    upstream = torch.randn_like(x)
    scale.requires_grad_()
    (only,) = torch.autograd.grad(group_norm_silu(x, 2, weight, scale=scale), scale, upstream)
    x.requires_grad_()
    _, both = torch.autograd.grad(
        group_norm_silu(x, 2, weight, scale=scale), (x, scale), upstream
    )  # fmt: skip
    assert torch.equal(only, both)


@every_path
def test_mixed_dtypes_and_autocast() -> None:
    """float32 weights beside a bfloat16 input, as mixed precision has them."""
    operands = _operands((2, 8, 3, 3), EVERY_OPTION, torch.float32)
    operands["x"], operands["residual"] = operands["x"].bfloat16(), operands["residual"].bfloat16()
    operands["channel_add"] = operands["channel_add"].half()
    upstream = torch.randn(2, 8, 3, 3)
    outside = _with_gradients(lambda o: _fused(o, 2, "silu"), operands, upstream)
    assert [t.dtype for t in outside[1:]] == [t.dtype for t in operands.values()]
    assert outside[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _with_gradients(lambda o: _fused(o, 2, "silu"), operands, upstream)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@every_path
def test_runs_are_bit_equal_and_every_element_is_written(poisoned_memory: None) -> None:
    operands = _operands((2, 24, 5, 3), EVERY_OPTION, torch.float32)
    upstream = torch.randn(2, 24, 5, 3)
    runs = [_with_gradients(lambda o: _fused(o, 4, "silu"), operands, upstream) for _ in range(3)]
    for run in runs:
        assert all(
            torch.equal(a, b) and a.isfinite().all() for a, b in zip(run, runs[0], strict=True)
        )


@every_path
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_once_for_every_size(layout: str, laid_out: Any) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_fused, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for shape in [(2, 8, 4, 6), (3, 8, 5, 7), (4, 8, 9, 3)]:
        operands = _operands(shape, EVERY_OPTION, torch.float32)
        operands["x"] = laid_out(operands["x"], layout)
        upstream = torch.randn(shape)
        expected = _with_gradients(lambda o: _fused(o, 4, "silu"), operands, upstream)
        actual = _with_gradients(lambda o: compiled(o, 4, "silu"), operands, upstream)
        assert actual[0].stride() == expected[0].stride()
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 3


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    operands = _operands((2, 8, 4, 4), ("weight", "bias", "channel_add"), torch.float32)
    upstream = torch.randn(2, 8, 4, 4)
    compiled = torch.compile(_fused, fullgraph=True)
    expected = _with_gradients(lambda o: _fused(o, 4, "silu"), operands, upstream)
    actual = _with_gradients(lambda o: compiled(o, 4, "silu"), operands, upstream)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4)}, r"x: got .*\[4\].*accepted: a floating tensor \[B, C"),
        ({"x": torch.zeros(2, 4, 0, 3)}, r"x: got .*\[2, 4, 0, 3\].*at least one"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x: got torch.int64"),
        ({"num_groups": 3}, "num_groups: got 3; accepted: a divisor of 4"),
        ({"num_groups": 0}, "num_groups: got 0"),
        ({"activation": "relu"}, "activation: got 'relu'; accepted: 'silu' or None"),
        ({"weight": torch.zeros(5)}, r"weight: got .*\[5\].*accepted: a floating tensor \[4\]"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, "bias: got torch.int32"),
        ({"channel_add": torch.zeros(4)}, r"channel_add: .*\[2, 4\] \(\[B, C\]\)"),
        ({"scale": torch.zeros(2, 4, 1, 1)}, "scale: got"),
        ({"shift": torch.zeros(2, 4, device="meta")}, "shift: got .* on meta.*on cpu"),
        ({"residual": torch.zeros(2, 4, 3, 1)}, "residual: got .*the shape of x"),
        ({"residual": torch.zeros(2, 4, 3, 3).half()}, "residual: got torch.float16"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 4, 3, 3), "num_groups": 2, **changes}
    with pytest.raises(ConfigError, match=message):
        group_norm_silu(**arguments)
