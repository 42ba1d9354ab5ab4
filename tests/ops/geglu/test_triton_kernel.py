"""The Triton kernels of geglu, in the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops

pytest.importorskip("triton")

from fastldm.ops.geglu import triton_kernel

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Of the UNets of latent diffusion and Stable Diffusion: four times the channels of their levels.
WIDTHS = [640, 768, 1024, 1280, 1920, 2048, 2560, 3840, 4096, 5120]


def _plain(hidden_states: Tensor) -> Tensor:
    """The composition that the operator replaces."""
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _fused(hidden_states: Tensor) -> Tensor:
    with ops.backend("triton"):
        return ops.geglu(hidden_states)


def _with_gradient(
    function: Callable[[Tensor], Tensor], hidden_states: Tensor, upstream: Tensor
) -> list[Tensor]:
    leaf = hidden_states.detach().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, upstream.to(y.dtype))]


def _draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    hidden, upstream = 3 * torch.randn(shape), torch.randn(*shape[:-1], shape[-1] // 2)
    return hidden.to(device, dtype), upstream.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 40), (1, 2), (70, 300), (6,), (2, 1, 5, 130)], ids=str)
def test_output_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, assert_accurate: Any, triton_device: str
) -> None:
    hidden, upstream = _draw(shape, dtype, triton_device)
    exact = _with_gradient(_plain, hidden.double(), upstream)
    plain = _with_gradient(_plain, hidden, upstream)
    for got, same_dtype, truth in zip(
        _with_gradient(_fused, hidden, upstream), plain, exact, strict=True
    ):
        assert got.dtype == dtype
        assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_the_models(width: int, assert_accurate: Any, triton_device: str) -> None:
    hidden, upstream = _draw((3, 2 * width), torch.bfloat16, triton_device)
    exact = _with_gradient(_plain, hidden.double(), upstream)
    plain = _with_gradient(_plain, hidden, upstream)
    for got, same_dtype, truth in zip(
        _with_gradient(_fused, hidden, upstream), plain, exact, strict=True
    ):
        assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_pad_nothing_at_widths_of_the_models(itemsize: int) -> None:
    for width in WIDTHS:
        rows, columns = triton_kernel.tile_of(width, itemsize)
        assert rows * columns * itemsize == triton_kernel.TILE_BYTES
        assert width % columns == 0


def _arranged(hidden: Tensor, strides: str) -> Tensor:
    """The same values: columns or rows of a larger tensor, transposed, or unevenly spaced."""
    rows, size, width = hidden.shape
    if strides == "columns":
        return hidden.new_full((rows, size, 3 * width), torch.nan)[..., 5 : 5 + width].copy_(hidden)
    if strides == "rows":
        return hidden.new_full((rows, 2 * size, width), torch.nan)[:, ::2].copy_(hidden)
    if strides == "uneven rows":
        return hidden.new_full((rows, 9, width), torch.nan)[:, 1 : 1 + size].copy_(hidden)
    if strides == "elements":
        return hidden.new_full((rows, size, 2 * width), torch.nan)[..., ::2].copy_(hidden)
    return hidden.transpose(0, 1).contiguous().transpose(0, 1)


IN_PLACE = {"columns": 36, "rows": 24, "uneven rows": None, "elements": None, "transposed": None}


@pytest.mark.parametrize("strides", IN_PLACE)
def test_strides(strides: str, triton_device: str) -> None:
    hidden, upstream = _draw((3, 7, 12), torch.float32, triton_device)
    given = _arranged(hidden, strides)
    assert triton_kernel.row_stride(given) == IN_PLACE[strides]
    expected = _with_gradient(_fused, hidden, upstream)
    spread = _arranged(upstream.repeat(1, 1, 2), strides)[..., :6]
    found = _with_gradient(_fused, given, spread)
    assert all(
        torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, expected, strict=True)
    )
    for repeated in (torch.ones((), device=triton_device), upstream[:1, :1]):
        same = repeated.expand(3, 7, 6)
        expected = _with_gradient(_fused, hidden, same.contiguous())
        assert torch.equal(_with_gradient(_fused, given, same)[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...], triton_device: str) -> None:
    hidden, upstream = _draw(shape, torch.float32, triton_device)
    y, gradient = _with_gradient(_fused, hidden, upstream)
    assert y.shape == upstream.shape
    assert gradient.shape == hidden.shape


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("shape", [(3, 7, 40), (70, 300), (9, 2 * 640)], ids=str)
def test_every_element_is_written_and_nothing_else(
    shape: tuple[int, ...], triton_device: str
) -> None:
    for result in _with_gradient(_fused, *_draw(shape, torch.float16, triton_device)):
        assert result.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_values_that_are_not_finite(triton_device: str) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 9.0, -1.0])
    value, gate = torch.meshgrid(special, special, indexing="ij")
    hidden = torch.cat([value.reshape(1, -1), gate.reshape(1, -1)], dim=-1).to(triton_device)
    upstream = torch.ones(1, hidden.shape[1] // 2, device=triton_device)
    exact = _with_gradient(_plain, hidden.double(), upstream)
    for got, truth in zip(_with_gradient(_fused, hidden, upstream), exact, strict=True):
        torch.testing.assert_close(got, truth.float(), rtol=1e-5, atol=1e-30, equal_nan=True)


def test_runs_are_bit_equal(triton_device: str) -> None:
    given = _draw((5, 300), torch.float32, triton_device)
    first, second = (_with_gradient(_fused, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives(triton_device: str) -> None:
    hidden, _ = _draw((2, 8), torch.float32, triton_device)

    def second(function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        leaf = given.requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    truth = second(_plain, hidden.double())
    torch.testing.assert_close(second(_fused, hidden).double(), truth, rtol=1e-4, atol=1e-3)


def test_compiled_without_a_graph_break(triton_device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.geglu, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.backend("triton"):
        for shape in [(2, 5, 12), (3, 7, 20)]:
            given = _draw(shape, torch.float32, triton_device)
            expected, actual = (_with_gradient(f, *given) for f in (ops.geglu, compiled))
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("stride", [2**30, 2**31 - 2], ids=str)
def test_offsets_beyond_32_bits(
    stride: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that lie far apart; the pages between them are never touched."""
    if triton_device == "cpu":
        from triton.runtime import interpreter

        # It would copy every argument's storage onto itself.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    hidden, upstream = _draw((4, 6), torch.float16, triton_device)
    far = torch.empty(3 * stride + 6, dtype=torch.float16, device=triton_device)
    far = far.as_strided((4, 6), (stride, 1)).copy_(hidden)
    found = _with_gradient(_fused, far, upstream)
    expected = _with_gradient(_fused, hidden, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
