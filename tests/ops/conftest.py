"""The error oracle, layouts and poisoned memory that the operators' tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastldm.ops import _dispatch, _extension, _schema

Oracle = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture
def assert_accurate(record_property: Callable[[str, object], None]) -> Iterator[Oracle]:
    """At most twice the error of plain torch in the same dtype, plus 2 ulp of the largest value.

    The worst error of each test module, as a share of what was allowed, ends the run's output.
    """
    ratios: list[float] = []

    def check(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert actual.shape == exact.shape
        if not exact.numel():
            return
        error = (actual.double() - exact).abs().max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item()
        allowed += 2 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
        ratios.append(error / allowed if allowed else 0.0)

    yield check
    if ratios:
        record_property("error / allowed", max(ratios))  # which tests/conftest.py sums up


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``Tensor.new_empty`` gives lies between guards, holds NaN, and no guard is touched."""
    margin, sentinel = 256, 0x5A
    buffers: list[tuple[Tensor, int]] = []

    def new_empty(self: Tensor, size: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        shape = (size,) if isinstance(size, int) else tuple(size)
        dtype, device = dtype or self.dtype, device or self.device
        used = math.prod(shape) * dtype.itemsize
        buffer = torch.full(
            (used + 2 * margin,), sentinel, dtype=torch.uint8, device=device
        )  # fmt: skip
        buffers.append((buffer, used))
        inside = buffer[margin : margin + used].view(dtype).view(shape)
        return inside.fill_(_poison(dtype))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    yield
    assert buffers, "nothing was allocated by Tensor.new_empty"
    for buffer, used in buffers:
        guards = torch.cat([buffer[:margin], buffer[margin + used :]])
        assert (guards == sentinel).all(), "written outside of a buffer"


class PaddedMemory(TorchDispatchMode):
    """Gives every new uninitialised tensor NaN inside and a band of a known value around it."""

    _BAND, _VALUE = 64, 12345.0

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    @property
    def tensors(self) -> int:
        """How many have been made."""
        return len(self._buffers)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "fastldm":
            # A mode does not see what an operator does inside, but it does what a kernel does.
            with self:
                return _schema.kernel(func._opname, kwargs.pop("backend"))(*args, **kwargs)
        made = func(*args, **kwargs)
        if func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.empty_like) or (
            not made.is_floating_point()
        ):
            return made
        # That the tensor is dense is what makes its memory one piece.
        assert made.untyped_storage().nbytes() == made.numel() * made.itemsize
        buffer = torch.full((made.numel() + 2 * self._BAND,), self._VALUE, dtype=made.dtype)
        self._buffers.append(buffer)
        inside = buffer.as_strided(made.size(), made.stride(), self._BAND)
        return inside.fill_(torch.nan)

    def assert_untouched(self) -> None:
        """The bands are as they were."""
        for buffer in self._buffers:
            bands = torch.cat([buffer[: self._BAND], buffer[-self._BAND :]])
            assert torch.equal(bands, torch.full_like(bands, self._VALUE))


@pytest.fixture
def padded_memory() -> type[PaddedMemory]:
    """A context in which new tensors have a band around them that nothing may write to."""
    return PaddedMemory


@pytest.fixture
def laid_out() -> Callable[[Tensor, str], Tensor]:
    """The same values in another memory layout: contiguous, channels_last or sliced."""

    def arrange(x: Tensor, layout: str) -> Tensor:
        if layout == "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        if layout == "contiguous":
            return x.contiguous()
        if layout == "channels_last sliced":
            wide = torch.full(
                (*x.shape[:1], *x.shape[2:], 2 * x.shape[1]), torch.nan, dtype=x.dtype
            )
            view = wide.movedim(-1, 1)[:, : x.shape[1]]
        else:
            wide = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), torch.nan)
            view = wide[:, ::2]
        return view.copy_(x)

    return arrange


@pytest.fixture(params=["formula", "raw"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through a functional whose reference is differentiable by itself.

    "raw" is the way of a kernel, through the raw operators and their autograd function, here with
    the reference's kernels behind a backend of another name. A test of an operator with a C++
    kernel asks for "cpp", too.
    """
    if request.param == "cpp" and _extension.problem():
        pytest.skip(str(_extension.problem()))
    if request.param == "raw":
        monkeypatch.setitem(_schema._MODULE_OF_BACKEND, "stand-in", "reference")
        monkeypatch.setattr(_dispatch, "choose", lambda *_, **__: "stand-in")
    else:
        name = "cpp" if request.param == "cpp" else "reference"
        monkeypatch.setattr(_dispatch, "choose", lambda *_, **__: name)
    return str(request.param)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New uninitialised tensors hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(params=["reference", "cpp"])
def lookup_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of vector_quantize that can serve here."""
    if request.param == "cpp" and _extension.problem():
        pytest.skip(str(_extension.problem()))
    return str(request.param)
