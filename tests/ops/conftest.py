"""The error oracle, layouts and poisoned memory that the operators' tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

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


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton kernels run: a GPU, or the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    the reference's kernels behind a backend of another name.
    """
    if request.param == "raw":
        monkeypatch.setitem(_schema._MODULE_OF_BACKEND, "stand-in", "reference")
        monkeypatch.setattr(_dispatch, "choose", lambda *_, **__: "stand-in")
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
