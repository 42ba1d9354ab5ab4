"""The velocity of every scheduler."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from fastldm import schedulers
from fastldm.schedulers import SchedulerMixin

ALL = sorted(SchedulerMixin._compatibles)
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("name", ALL)
def test_velocity(name):
    """√ᾱ·ε − √(1−ᾱ)·x₀, and diffusers' where its scheduler has it."""
    random = np.random.default_rng(0)
    x0, noise = random.standard_normal((2, 3, 2, 4, 4))
    timesteps = np.array([0, 500, 999])
    bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[timesteps]
    bar = bar.reshape(-1, 1, 1, 1)
    arguments = tuple(map(torch.from_numpy, (x0, noise, timesteps)))
    exact = getattr(schedulers, name)(**CONFIG, schedule_dtype="float64")
    found = exact.get_velocity(*arguments)
    expected = np.sqrt(bar) * noise - np.sqrt(1 - bar) * x0
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-13)
    theirs = getattr(diffusers, name)(**CONFIG)
    if hasattr(theirs, "get_velocity") and name != "EulerDiscreteScheduler":
        ours = getattr(schedulers, name)(**CONFIG)
        for dtype in (torch.float32, torch.float64):
            x0_t, noise_t = (tensor.to(dtype) for tensor in arguments[:2])
            pair = [one.get_velocity(x0_t, noise_t, arguments[2]) for one in (ours, theirs)]
            torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-7)


def test_eulers_velocity_is_that_of_the_time_step():
    """diffusers' looks its own list's positions up, which descends where ᾱ does not."""
    x0, noise = torch.randn(2, 2, 3, 4, 4)
    timesteps = torch.tensor([100, 700])
    theirs = diffusers.EulerDiscreteScheduler(**CONFIG)
    ours = schedulers.EulerDiscreteScheduler(**CONFIG)
    mirrored = theirs.get_velocity(x0, noise, (999 - timesteps).float())
    found = ours.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(found, mirrored, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.get_velocity(x0, noise, timesteps.float()), found)


def test_diffusers_has_it_in_no_further_scheduler():
    theirs = {name for name in ALL if hasattr(getattr(diffusers, name), "get_velocity")}
    assert theirs >= {"DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "LCMScheduler"}
    assert all(hasattr(getattr(schedulers, name), "get_velocity") for name in ALL)
