"""geglu against float64, its gradients of both orders, strides, compilation, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import geglu

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
_PATHS = pytest.mark.parametrize("path", ["formula", "raw", "cpp"], indirect=True)


def every_path(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test by the reference's formula, by its raw operators and by the C++ kernels."""
    return pytest.mark.usefixtures("path")(_PATHS(test))


def _plain(hidden_states: Tensor) -> Tensor:
    """The composition that the operator replaces."""
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _naive(hidden_states: Tensor) -> Tensor:
    """The formula, term by term."""
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * gate * torch.special.erfc(-gate / 2**0.5) / 2


def _with_gradient(
    function: Callable[[Tensor], Tensor], hidden_states: Tensor, upstream: Tensor
) -> list[Tensor]:
    leaf = hidden_states.detach().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, upstream.to(y.dtype))]


def _served(dtype: torch.dtype, path: str) -> None:
    if path == "cpp" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")


@every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_output_and_gradient(
    dtype: torch.dtype, scale: float, path: str, assert_accurate: Any
) -> None:
    _served(dtype, path)
    hidden, upstream = (scale * torch.randn(3, 7, 40)).to(dtype), torch.randn(3, 7, 20).to(dtype)
    exact = _with_gradient(_naive, hidden.double(), upstream)
    plain = _with_gradient(_plain, hidden, upstream)
    actual = _with_gradient(geglu, hidden, upstream)
    for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        if dtype == torch.float64:
            torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)
        else:
            assert_accurate(got, same_dtype, truth)


def _arranged(hidden: Tensor, strides: str) -> Tensor:
    """The same values: columns or rows of a larger tensor, transposed, or unevenly spaced."""
    if strides == "columns":
        wide = hidden.new_full((*hidden.shape[:-1], 3 * hidden.shape[-1]), torch.nan)
        return wide[..., 5 : 5 + hidden.shape[-1]].copy_(hidden)
    if strides == "rows":
        return hidden.new_full((3, 14, 12), torch.nan)[:, ::2].copy_(hidden)
    if strides == "uneven rows":
        return hidden.new_full((3, 9, 12), torch.nan)[:, 1:8].copy_(hidden)
    if strides == "elements":
        return hidden.new_full((3, 7, 24), torch.nan)[..., ::2].copy_(hidden)
    return hidden.transpose(0, 1).contiguous().transpose(0, 1)


@every_path
@pytest.mark.parametrize("strides", ["columns", "rows", "uneven rows", "elements", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(strides: str, dtype: torch.dtype) -> None:
    hidden, upstream = torch.randn(3, 7, 12).to(dtype), torch.randn(3, 7, 6).to(dtype)
    given = _arranged(hidden, strides)
    assert not given.is_contiguous()
    expected = _with_gradient(geglu, hidden, upstream)
    leaf = given.detach().requires_grad_()
    y = geglu(leaf)
    spread = _arranged(upstream.repeat(1, 1, 2), strides)[..., :6]
    (gradient,) = torch.autograd.grad(y, leaf, spread)
    assert y.is_contiguous()
    assert torch.equal(y, expected[0])
    assert torch.equal(gradient, expected[1])


@every_path
@pytest.mark.parametrize("shape", [(2,), (6,), (1, 2), (0, 4, 8), (3, 0, 8), (2, 1, 3, 10)])
def test_shapes(shape: tuple[int, ...], path: str) -> None:
    hidden = torch.randn(shape)
    upstream = torch.randn(*shape[:-1], shape[-1] // 2)
    exact = _with_gradient(_naive, hidden.double(), upstream.double())
    for got, truth in zip(_with_gradient(geglu, hidden, upstream), exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@every_path
def test_an_expanded_gradient(path: str) -> None:
    """As that of a sum: strides of 0."""
    hidden = torch.randn(3, 7, 12)
    for upstream in (torch.ones(()).expand(3, 7, 6), torch.randn(6).expand(3, 7, 6)):
        expected = _with_gradient(geglu, hidden, upstream.contiguous())
        assert torch.equal(_with_gradient(geglu, hidden, upstream)[1], expected[1])


@every_path
def test_values_that_are_not_finite(path: str) -> None:
    """As the formula in float64, where plain float32 may overflow on the way."""
    largest = torch.finfo(torch.float32).max
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, -largest, 9.0, -1.0]
    )
    if path != "cpp":
        special = special[special.abs() < 1e30]
    value, gate = torch.meshgrid(special, special, indexing="ij")
    hidden = torch.cat([value.reshape(1, -1), gate.reshape(1, -1)], dim=-1)
    upstream = torch.ones(1, hidden.shape[1] // 2)
    exact = _with_gradient(_plain, hidden.double(), upstream)
    for got, truth in zip(_with_gradient(geglu, hidden, upstream), exact, strict=True):
        torch.testing.assert_close(got, truth.float(), rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("path", ["formula", "raw"], indirect=True)
def test_gradcheck_of_both_orders() -> None:
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(geglu, hidden)
    assert torch.autograd.gradgradcheck(geglu, hidden)


@every_path
def test_second_derivatives(path: str) -> None:
    hidden = torch.randn(2, 3, 8)

    def second(function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        leaf = given.requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    truth = second(_naive, hidden.double())
    torch.testing.assert_close(second(geglu, hidden).double(), truth, rtol=1e-4, atol=1e-4)


@every_path
def test_autocast_has_no_effect(path: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, upstream = torch.randn(3, 8).to(dtype), torch.randn(3, 4).to(dtype)
        outside = _with_gradient(geglu, hidden, upstream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = _with_gradient(geglu, hidden, upstream)
        assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@every_path
def test_compiled_once_for_every_size(path: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(geglu, fullgraph=True, dynamic=True, backend=counter)
    for shape in [(2, 5, 12), (3, 7, 20), (4, 6, 36)]:
        hidden, upstream = torch.randn(shape), torch.randn(*shape[:-1], shape[-1] // 2)
        expected = _with_gradient(geglu, hidden, upstream)
        actual = _with_gradient(compiled, hidden, upstream)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert counter.frame_count == 1


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    hidden, upstream = torch.randn(5, 7, 12), torch.randn(5, 7, 6)
    expected = _with_gradient(geglu, hidden, upstream)
    actual = _with_gradient(torch.compile(geglu, fullgraph=True), hidden, upstream)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("hidden_states", "message"),
    [
        (torch.zeros(()), r"hidden_states: got .*\[\].*accepted: a floating tensor \[..., 2·D\]"),
        (torch.zeros(2, 5), r"hidden_states: got .*\[2, 5\]"),
        (torch.zeros(2, 0), r"hidden_states: got .*\[2, 0\]"),
        (torch.zeros(2, 4, dtype=torch.int64), "hidden_states: got torch.int64"),
    ],
)
def test_bad_arguments(hidden_states: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        geglu(hidden_states)
