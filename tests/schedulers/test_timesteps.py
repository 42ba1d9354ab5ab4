"""Time step spacings, for every number of steps."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import DDIMScheduler
from fastldm.schedulers.timesteps import (
    COMPVIS_SPACINGS,
    TIMESTEP_SPACINGS,
    custom_timesteps,
    spaced_timesteps,
)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_every_number_of_steps(spacing, offset):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 1001):
        ours = spaced_timesteps(steps, 1000, spacing, offset)
        assert ours.dtype == torch.int64
        assert len(ours) == steps
        assert bool((ours[:-1] > ours[1:]).all()), steps
        assert 0 <= ours[-1] <= ours[0] <= 999, steps
        theirs.set_timesteps(steps)
        # diffusers gives a time step too many, −1, for some numbers of trailing steps, and goes
        # beyond the training schedule where the offset does not fit.
        if bool((theirs.timesteps <= 999).all()):
            assert torch.equal(ours, theirs.timesteps[theirs.timesteps >= 0]), steps


@pytest.mark.parametrize("spacing", [*TIMESTEP_SPACINGS, *COMPVIS_SPACINGS])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_steps_are_finite_for_every_number_of_steps(spacing, to_one):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        timestep_spacing=spacing,
        steps_offset=1,
        set_alpha_to_one=to_one,
    )
    sample = torch.ones(1, 1, 1, 1)
    for steps in [*range(1, 1000, 7), 334, 400, 500, 501, 999, 1000]:
        scheduler.set_timesteps(steps)
        for timestep in (scheduler.timesteps[0], scheduler.timesteps[-1]):
            result = scheduler.step(sample, timestep, sample, eta=1.0, variance_noise=sample)
            assert bool(result.prev_sample.isfinite()), (steps, timestep)


def compvis_timesteps(spacing, steps):
    """The time steps of CompVis's samplers, whatever becomes of the last of them."""
    if spacing == "uniform":
        return np.arange(0, 1000, 1000 // steps) + 1
    return (np.linspace(0, np.sqrt(800), steps) ** 2).astype(int) + 1


@pytest.mark.parametrize("spacing", COMPVIS_SPACINGS)
def test_compvis_time_steps_for_every_number_of_steps(spacing):
    for steps in range(1, 1001):
        ours = spaced_timesteps(steps, 1000, spacing, 1)
        original = np.unique(compvis_timesteps(spacing, steps))
        # The original goes one beyond the training schedule for 599 numbers of uniform steps.
        beyond = max(0, int(original[-1]) - 999)
        assert ours.tolist() == (original - beyond)[::-1].tolist(), steps
    assert len(spaced_timesteps(400, 1000, "uniform", 1)) == 500
    assert len(spaced_timesteps(300, 1000, "uniform", 1)) == 334


def test_shorter_training_schedules():
    assert spaced_timesteps(4, 4, "leading", 3).tolist() == [3, 2, 1, 0]
    assert spaced_timesteps(2, 7, "leading", 1).tolist() == [4, 1]
    assert spaced_timesteps(1, 7, "trailing").tolist() == [6]
    assert spaced_timesteps(2, 7, "linspace").tolist() == [6, 0]


def test_custom_timesteps():
    assert custom_timesteps(np.array([9, 4, 0]), 10).tolist() == [9, 4, 0]
    with pytest.raises(ConfigError, match=r"timesteps: got \[20, 19, 18, .*…\].*9 down to 0"):
        custom_timesteps(range(20, 0, -1), 10)


@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5, "10", None])
def test_bad_numbers_of_steps_are_named(steps):
    with pytest.raises(ConfigError, match=r"num_inference_steps: got .*from 1 to 1000"):
        spaced_timesteps(steps, 1000, "leading")
    with pytest.raises(ValueError, match="num_inference_steps"):
        DDIMScheduler().set_timesteps(steps)
