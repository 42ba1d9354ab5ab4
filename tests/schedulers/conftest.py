"""Sampling with a model that is a formula, the same for our schedulers and diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPE = (2, 3, 4, 4)


def model(sample: Tensor, timestep: Any, with_variance: bool) -> Tensor:
    """Bounded, nonlinear and different at every time step."""
    output = torch.sin(1.3 * sample + 0.01 * float(timestep)) + 0.1 * torch.tanh(sample)
    if not with_variance:
        return output
    return torch.cat((output, torch.sigmoid(sample.clamp(-3, 3))), dim=1)


@pytest.fixture
def trajectory() -> Callable[..., tuple[Tensor, Tensor]]:
    """All samples and all predictions of x₀ of one sampling run, [S, B, C, H, W] each."""

    def run(
        scheduler: Any, steps: int, dtype: torch.dtype = torch.float32, **options: Any
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        sample = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        with_variance = getattr(scheduler, "variance_type", "").startswith("learned")
        scheduler.set_timesteps(steps)
        samples, originals = [], []
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(sample, timestep)
            output = model(model_input, timestep, with_variance)
            result = scheduler.step(output, timestep, sample, generator=generator, **options)
            sample = result.prev_sample
            samples.append(sample)
            originals.append(result.pred_original_sample)
        return torch.stack(samples), torch.stack(originals)

    return run


@pytest.fixture
def assert_equal_trajectories() -> Callable[..., None]:
    """Equal within a bound relative to the largest value of each step."""

    def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
        bound = 1e-12 if want[0].dtype == torch.float64 else 1e-5
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            assert bool(theirs.isfinite().all())
            scale = theirs.flatten(1).abs().amax(1).clamp(min=1e-3)
            error = (ours - theirs).flatten(1).abs().amax(1) / scale
            assert float(error.max()) <= bound

    return check
