"""Sampling with a model that is a formula, the same for our schedulers and diffusers'."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

SHAPE = (2, 3, 4, 4)

_EXACT = 1e-12
_CLOSE = 1e-5


def model(sample: Tensor, timestep: Any, with_variance: bool) -> Tensor:
    """Bounded, nonlinear and different at every time step."""
    output = torch.sin(0.8 * sample + 0.01 * float(timestep)) + 0.1 * torch.tanh(sample)
    if not with_variance:
        return output
    return torch.cat((output, torch.sigmoid(sample.clamp(-3, 3))), dim=1)


@pytest.fixture(autouse=True)
def _quiet_diffusers() -> None:
    diffusers.logging.set_verbosity_error()


@pytest.fixture
def trajectory() -> Callable[..., tuple[Tensor, ...]]:
    """All samples of one sampling run and, where steps give them, all predictions of x₀."""

    def run(
        scheduler: Any,
        steps: int | dict[str, Any],
        dtype: torch.dtype = torch.float32,
        *,
        begin: int = 0,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        sample = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        with_variance = (scheduler.config.get("variance_type") or "").startswith("learned")
        scheduler.set_timesteps(**steps) if isinstance(steps, dict) else scheduler.set_timesteps(
            steps
        )
        begin *= scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        sample = sample * scheduler.init_noise_sigma
        accepted = inspect.signature(scheduler.step).parameters
        samples, originals = [sample], []
        for timestep in scheduler.timesteps[begin:]:
            model_input = scheduler.scale_model_input(sample, timestep)
            output = model(model_input, timestep, with_variance)
            given = dict(options)
            if given.pop("draws_outside", False):
                given["variance_noise"] = torch.randn(SHAPE, generator=generator)
            elif "generator" in accepted:
                given["generator"] = generator
            result = scheduler.step(output, timestep, sample, **given)
            sample = result.prev_sample
            samples.append(sample)
            originals.append(getattr(result, "pred_original_sample", None))
        if originals[0] is None:
            return (torch.stack(samples),)
        return torch.stack(samples), torch.stack(originals)

    return run


def errors(got: Tensor, want: Tensor) -> Tensor:
    """The error of each step, relative to the largest value that went into it or came out."""
    largest = want.flatten(1).abs().amax(1).double()
    scale = torch.maximum(largest, torch.cat((largest[:1], largest[:-1]))).clamp(min=1e-3)
    return (got.double() - want.double()).flatten(1).abs().amax(1) / scale


@pytest.fixture
def assert_equal_trajectories() -> Callable[..., None]:
    """Equal within a bound relative to the largest value of each step."""

    def check(
        got: tuple[Tensor, ...], want: tuple[Tensor, ...], bound: float | None = None
    ) -> None:
        for ours, theirs in zip(got, want, strict=False):
            assert ours.shape == theirs.shape
            assert bool(theirs.isfinite().all())
            limit = bound or (_EXACT if theirs.dtype == torch.float64 else _CLOSE)
            assert float(errors(ours, theirs).max()) <= limit
        assert got[0].dtype == want[0].dtype

    return check


@pytest.fixture
def compare(trajectory: Any, assert_equal_trajectories: Any) -> Callable[..., None]:
    """Our whole trajectories are diffusers', in float64 to 1e-12 and in float32 to 1e-5.

    In float32 rounding may cost diffusers about as much, as its distance from our trajectory in
    float64 shows; then it may cost us no more than that or twice what it costs diffusers in samples
    or predictions of x₀, each of which is made of the other. `bound` is for those of diffusers'
    schedulers that round to float32 what they get in float64.
    `stochastic` says that they draw other noise in float64, so that our trajectory in float64 with
    the noise of float32 is made, too.
    """

    def check(
        ours: Any,
        theirs: Any,
        steps: Any,
        *,
        bound: float | None = None,
        stochastic: bool = False,
        **options: Any,
    ) -> None:
        exact = trajectory(ours, steps, torch.float64, **options)
        assert_equal_trajectories(exact, trajectory(theirs, steps, torch.float64, **options), bound)
        got, want = (trajectory(one, steps, torch.float32, **options) for one in (ours, theirs))
        if stochastic:
            exact = trajectory(ours, steps, torch.float64, draws_outside=True, **options)
        parts = list(zip(got, want, exact, strict=False))
        costs = [float(errors(other, full).max()) for _, other, full in parts]
        for (mine, other, full), cost in zip(parts, costs, strict=True):
            if cost <= _CLOSE / 4:
                assert_equal_trajectories((mine,), (other,))
            else:
                assert mine.dtype == torch.float32
                assert float(errors(mine, full).max()) <= max(_CLOSE, 2 * max(costs))

    return check


class _InFloat64:
    """A module whose float32 is its float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def _in_float64(scheduler: type) -> Iterator[None]:
    home = sys.modules[scheduler.__module__]
    originals = {name: vars(home)[name] for name in ("torch", "np")}
    vars(home).update({name: _InFloat64(module) for name, module in originals.items()})
    try:
        yield
    finally:
        vars(home).update(originals)


@pytest.fixture
def compare_in_float64(trajectory: Any, assert_equal_trajectories: Any) -> Callable[..., None]:
    """With ``schedule_dtype="float64"`` our trajectories are diffusers' as computed in float64.

    diffusers rounds schedules and samples to float32 here and there; here it does not.
    """

    def check(
        ours: type,
        theirs: Any,
        config: dict[str, Any],
        steps: Any,
        *,
        bound: float | None = None,
        **options: Any,
    ) -> None:
        scheduler = ours(**config, schedule_dtype="float64")
        with _in_float64(theirs):
            want = trajectory(theirs(**config), steps, torch.float64, **options)
        got = trajectory(scheduler, steps, torch.float64, **options)
        assert_equal_trajectories(got, want, bound)

    return check
