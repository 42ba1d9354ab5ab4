"""`HeunDiscreteScheduler` against diffusers' scheduler."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from fastldm.schedulers import HeunDiscreteScheduler

OURS, THEIRS = HeunDiscreteScheduler, diffusers.HeunDiscreteScheduler
SD = {"beta_schedule": "scaled_linear"}
BETAS = [
    SD,
    {"beta_schedule": "linear", "beta_end": 0.02},
    {"beta_schedule": "exp"},
    {"trained_betas": np.linspace(0.001, 0.015, 1000).tolist()},
]
CASES = [
    {"prediction_type": prediction, "timestep_spacing": spacing, **BETAS[index % 4]}
    for index, (prediction, spacing) in enumerate(
        itertools.product(
            ["epsilon", "sample", "v_prediction"], ["leading", "linspace", "trailing"]
        )
    )
]
CASES += [
    {"steps_offset": 1, "timestep_spacing": "leading", **SD},
    {"use_karras_sigmas": True, **SD},
    {"use_exponential_sigmas": True, "prediction_type": "v_prediction", **SD},
    {"use_beta_sigmas": True, **SD},
    {"clip_sample": True, **SD},
    {"clip_sample": True, "clip_sample_range": 0.7, "prediction_type": "v_prediction", **SD},
    {"clip_sample": True, "clip_sample_range": 0.7, "prediction_type": "sample", **SD},
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare, compare_in_float64):
    config = CASES[index]
    for steps in [1, 2, 5, 20, 50]:
        ours, theirs = OURS(**config), THEIRS(**config)
        compare(ours, theirs, steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)
    compare_in_float64(OURS, THEIRS, config, 20)


@pytest.mark.parametrize(("prediction_type", "steps"), [("epsilon", 1000), ("v_prediction", 999)])
def test_long_trajectories_are_those_of_diffusers(prediction_type, steps, compare):
    config = {"prediction_type": prediction_type, **SD}
    compare(OURS(**config), THEIRS(**config), steps)


@pytest.mark.parametrize("begin", [1, 7, 19])
def test_a_run_may_begin_in_the_middle(begin, compare):
    compare(OURS(**SD), THEIRS(**SD), 20, begin=begin)


def test_a_run_begins_at_the_second_of_equal_time_steps(compare):
    """Without `set_begin_index`, as in image-to-image code of old."""
    ours, theirs = OURS(**SD), THEIRS(**SD)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        assert scheduler.index_for_timestep(scheduler.timesteps[5]) == 6
        assert scheduler.index_for_timestep(scheduler.timesteps[0]) == 0


def test_samples_that_are_changed_between_the_halves():
    """Inpainting overwrites a part of the sample after each call of the step."""
    ours, theirs = OURS(**SD), THEIRS(**SD)
    samples = [torch.randn(2, 3, 4, 4, dtype=torch.float64) * 10] * 2
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    for timestep in ours.timesteps:
        for index, scheduler in enumerate((ours, theirs)):
            sample = scheduler.scale_model_input(samples[index], timestep)
            result = scheduler.step(sample.sin(), timestep, samples[index]).prev_sample.clone()
            result[:, 0] = 0.25
            samples[index] = result
        torch.testing.assert_close(*samples, rtol=1e-12, atol=1e-12)


def test_state_in_first_order():
    scheduler = OURS(**SD)
    scheduler.set_timesteps(3)
    sample = torch.randn(1, 2, 2, 2)
    seen = []
    for timestep in scheduler.timesteps:
        seen.append(scheduler.state_in_first_order)
        sample = scheduler.step(sample, timestep, sample).prev_sample
    assert seen == [True, False, True, False, True]
