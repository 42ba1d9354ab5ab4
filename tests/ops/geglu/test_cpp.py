"""The C++ kernels of geglu: bits, memory and accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops import _extension, geglu

pytestmark = pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Rows shorter than a register, longer than a part, and no multiple of either.
SHAPES = [(5, 2), (3, 7, 38), (2, 2 * 2500), (64, 2 * 1025), (1, 2 * 40000)]


@pytest.fixture(autouse=True)
def _served_by_cpp() -> Iterator[None]:
    with ops.backend("cpp"):
        yield


def _results(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
    y = geglu(hidden)
    return [y.detach(), *torch.autograd.grad(y, hidden, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(_results(shape, dtype))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_every_element_is_written_and_none_beside(
    shape: tuple[int, ...], dtype: torch.dtype, padded_memory: Any
) -> None:
    expected = _results(shape, dtype)
    with padded_memory() as memory:
        found = _results(shape, dtype)
    assert memory.tensors >= len(found)
    memory.assert_untouched()
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
        assert got.isfinite().all()


def _of_gates(gates: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u) and its derivative."""
    hidden = torch.cat([torch.ones_like(gates), gates])[None].requires_grad_()
    y = geglu(hidden)
    (gradient,) = torch.autograd.grad(y, hidden, torch.ones_like(y))
    return y.detach()[0], gradient[0, len(gates) :]


def test_gelu_keeps_its_digits_on_both_sides() -> None:
    """Plain float32 has none left below -5, where 1 + erf cancels."""
    gates = torch.cat(
        [torch.linspace(-12, 12, 100_001), *(s * torch.logspace(-30, 0, 4000) for s in (1, -1))]
    )
    found, slope = _of_gates(gates)
    u = gates.double()
    distribution = torch.special.erfc(-u / 2**0.5) / 2
    exact = u * distribution
    ulp = torch.finfo(torch.float32).eps
    # Rounding u²/2 costs half an ulp of it in the exponential.
    allowed = (4 + u.square() / 2 * (u < 0)) * ulp * exact.abs()
    assert ((found.double() - exact).abs() <= allowed).all()
    exact_slope = distribution + u * (-u.square() / 2).exp() / (2 * torch.pi) ** 0.5
    assert (slope.double() - exact_slope).abs().max() <= 4 * ulp


def test_past_the_smallest_float_the_tail_is_zero() -> None:
    gates = torch.tensor([-13.2, -14.0, -1e4, -1e30, -torch.finfo(torch.float32).max])
    found, slope = _of_gates(gates)
    assert torch.equal(found, torch.full_like(found, -0.0))
    assert torch.equal(slope, torch.zeros_like(slope))
