"""The C++ kernels of group_norm_silu: bits, memory and extreme values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops import _extension, group_norm_silu

pytestmark = pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["contiguous", "channels_last"]
# A channel shorter than a run, longer, and no multiple of a register; few and many channels.
SHAPES = [(2, 24, 5, 3), (1, 8, 67, 71), (3, 96, 16, 16), (2, 1280, 3, 3), (2, 6, 1, 1)]
# Pixels, and with channels innermost channels, that fill blocks of 32 and 64, or leave a rest: of
# 30, registers of every width and single numbers. Pixels of more than a run.
BLOCKS = [(2, 24, 8, 8), (2, 64, 8, 24), (2, 80, 5, 16), (1, 12, 16, 65), (3, 128, 2, 2),
          (2, 30, 5, 7), (2, 8, 64, 67)]  # fmt: skip


@pytest.fixture(autouse=True)
def _served_by_cpp() -> Iterator[None]:
    with ops.backend("cpp"):
        yield


def _results(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    laid_out: Any,
    stored_as: torch.dtype | None = None,
) -> list[Tensor]:
    """Output and every gradient, with every option, of numbers that `stored_as` has, too."""
    generator = torch.Generator().manual_seed(7)

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator).to(stored_as or dtype).to(dtype)

    x, residual, upstream = (laid_out(draw(shape), layout) for _ in range(3))
    weight, bias = draw(shape[1:2]), draw(shape[1:2])
    add, scale, shift = (draw(shape[:2]) for _ in range(3))
    leaves = [t.requires_grad_() for t in (x, weight, bias, add, residual, scale, shift)]
    y = group_norm_silu(
        x, 2, weight, bias, channel_add=add, residual=residual, scale=scale, shift=shift
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, laid_out: Any
) -> None:
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(_results(shape, layout, dtype, laid_out))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_whole_blocks_and_rests(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, laid_out: Any, assert_accurate: Any
) -> None:
    found = _results(shape, layout, dtype, laid_out)
    with ops.backend("reference"):
        plain = _results(shape, layout, dtype, laid_out)
        exact = _results(shape, layout, torch.float64, laid_out, stored_as=dtype)
    for got, same_dtype, truth in zip(found, plain, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)
        else:
            assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 5, 3), (1, 8, 67, 71)], ids=str)
def test_every_element_is_written_and_none_beside(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, laid_out: Any, padded_memory: Any
) -> None:
    expected = _results(shape, layout, dtype, laid_out)
    with padded_memory() as memory:
        found = _results(shape, layout, dtype, laid_out)
    assert memory.tensors > len(found)
    memory.assert_untouched()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _silu_of(p: Tensor, layout: str, laid_out: Any, pixels: int = 17) -> Tensor:
    """silu(p) through the bias of a channel each; a weight of 0 silences the norm."""
    channels = p.numel()
    x = laid_out(torch.randn(1, channels, 1, pixels).to(p.dtype), layout)
    y = group_norm_silu(x, 1, torch.zeros_like(p), p)
    assert torch.equal(y, y[..., :1].expand_as(y)) or y.isnan().any()
    return y[0, :, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [17, 64, 80])
def test_silu_to_two_ulp(layout: str, pixels: int, laid_out: Any) -> None:
    p = torch.cat([torch.linspace(-20, 20, 20001), torch.logspace(-30, 1, 4000)])
    found = _silu_of(p, layout, laid_out, pixels).double()
    exact = p.double() * p.double().sigmoid()
    error = (found - exact).abs() / (exact.abs() * torch.finfo(torch.float32).eps)
    assert error[exact != 0].max() <= 2


def test_silu_to_three_ulp_in_float64(laid_out: Any) -> None:
    p = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    found = _silu_of(p, "contiguous", laid_out)
    torch.testing.assert_close(found, p * p.sigmoid(), rtol=7e-16, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_of_extreme_values_is_that_of_torch(
    dtype: torch.dtype, layout: str, laid_out: Any
) -> None:
    largest = torch.finfo(dtype).max
    p = torch.tensor(
        [0.0, -0.0, -80, -87, -89, -95, -104, 86, 88, 90, 200, -200, -700, -720, 720, largest,
         -largest, torch.inf, -torch.inf, torch.nan], dtype=dtype,
    )  # fmt: skip
    expected = torch.nn.functional.silu(p)
    torch.testing.assert_close(
        _silu_of(p, layout, laid_out), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-30,
        equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_input_is_normalised_to_zero(layout: str, laid_out: Any) -> None:
    x = laid_out(torch.full((2, 8, 9, 7), 0.1), layout)
    bias = torch.randn(8)
    assert torch.equal(group_norm_silu(x, 2, activation=None), torch.zeros_like(x))
    y = group_norm_silu(x, 2, None, bias, activation=None)
    assert torch.equal(y, bias.reshape(1, 8, 1, 1).expand_as(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [100.0, 4000.0])
def test_the_mean_is_not_rounded(layout: str, ratio: float, laid_out: Any) -> None:
    """Closer than torch's own norm, whose mean is a float32."""
    x = laid_out(torch.randn(2, 32, 16, 16) + ratio, layout)
    exact = torch.nn.functional.group_norm(x.double(), 8)
    assert (group_norm_silu(x, 8, activation=None) - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", [0, 1000, -1])
def test_one_outlier(layout: str, position: int, laid_out: Any) -> None:
    """A shift taken from a single element would lose the deviation of the others."""
    x = torch.randn(1, 4, 40, 40)
    x.view(-1)[position] = 3e4
    exact = torch.nn.functional.group_norm(x.double(), 1)
    found = group_norm_silu(laid_out(x, layout), 1, activation=None).double()
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [1, 2])
def test_a_mean_that_moves(axis: int, layout: str, laid_out: Any) -> None:
    """From channel to channel or row to row, by far more than the deviation around it."""
    steps = (-1.0) ** torch.arange(64) * torch.linspace(1e3, 1e4, 64)
    x = torch.randn(1, 64, 64, 8) + steps.view([-1 if i == axis else 1 for i in range(4)])
    exact = torch.nn.functional.group_norm(x.double(), 2)
    plain = torch.nn.functional.group_norm(x, 2)
    found = group_norm_silu(laid_out(x, layout), 2, activation=None)
    allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(x.dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_that_end_within_a_run(layout: str, laid_out: Any) -> None:
    """Of 4757 pixels, where a run has 4096 elements; each channel has its own weight."""
    x, weight, bias = torch.randn(2, 4, 67, 71), torch.randn(4), torch.randn(4)
    exact = torch.nn.functional.group_norm(x.double(), 2, weight.double(), bias.double())
    found = group_norm_silu(laid_out(x, layout), 2, weight, bias, activation=None).double()
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_gives_the_bits_of_training(layout: str, laid_out: Any) -> None:
    """It has an entry of its own, which keeps no statistics."""
    x = laid_out(torch.randn(3, 48, 17, 19), layout)
    found = group_norm_silu(x, 8)
    assert torch.equal(found, group_norm_silu(x.requires_grad_(), 8).detach())
