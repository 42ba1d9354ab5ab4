"""`LMSDiscreteScheduler` against diffusers' scheduler, whose weights are rounded to float32."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import LMSDiscreteScheduler

OURS, THEIRS = LMSDiscreteScheduler, diffusers.LMSDiscreteScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [SD, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
CASES = [
    {"prediction_type": prediction, "timestep_spacing": spacing, **BETAS[(index // 2) % 3]}
    for index, (prediction, spacing) in enumerate(
        itertools.product(
            ["epsilon", "sample", "v_prediction"], ["leading", "linspace", "trailing"]
        )
    )
]
CASES += [
    {"use_karras_sigmas": True, **SD},
    {"use_exponential_sigmas": True, "prediction_type": "v_prediction", **SD},
    {"use_beta_sigmas": True, **SD},
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare, compare_in_float64):
    config = CASES[index]
    for steps in [1, 2, 5, 20]:
        ours, theirs = OURS(**config), THEIRS(**config)
        compare(ours, theirs, steps, bound=1e-5)
        assert torch.equal(ours.timesteps, theirs.timesteps)
    # Its quadrature is as exact as the noise levels, which lie close together.
    compare_in_float64(OURS, THEIRS, config, 20, bound=1e-11)


def test_long_trajectories_are_those_of_diffusers(trajectory, assert_equal_trajectories):
    assert_equal_trajectories(trajectory(OURS(**SD), 1000), trajectory(THEIRS(**SD), 1000))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_other_orders(order, compare):
    compare(OURS(**SD), THEIRS(**SD), 20, bound=1e-5, order=order)


@pytest.mark.parametrize("begin", [1, 7])
def test_a_run_may_begin_in_the_middle(begin, compare):
    compare(OURS(**SD), THEIRS(**SD), 20, begin=begin, bound=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_slopes_that_are_polynomials_are_integrated_exactly(order):
    """With ε = σ^(order−1) a step changes the sample by (σ'^order − σ^order)/order."""
    scheduler = OURS(**SD, schedule_dtype="float64")
    scheduler.set_timesteps(15)
    sample = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma, following = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        slope = torch.full_like(sample, float(sigma ** (order - 1)))
        result = scheduler.step(slope, timestep, sample, order=order).prev_sample
        if index >= order - 1:
            want = float((following**order - sigma**order) / order)
            scale = max(abs(float(sample)), abs(float(result)))
            np.testing.assert_allclose(float(result - sample), want, rtol=0, atol=1e-13 * scale)
        sample = result


def test_bad_calls_are_named():
    scheduler = OURS()
    scheduler.set_timesteps(10)
    sample = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ConfigError, match="order"):
        scheduler.step(sample, scheduler.timesteps[0], sample, order=0)
