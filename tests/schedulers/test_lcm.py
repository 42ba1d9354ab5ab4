"""`LCMScheduler` against diffusers' scheduler."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import LCMScheduler, LCMSchedulerOutput

OURS, THEIRS = LCMScheduler, diffusers.LCMScheduler
LIMITS = [
    {},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"thresholding": True, "sample_max_value": 1.5, "beta_schedule": "linear"},
]
CASES = [
    {"prediction_type": prediction, **limits}
    for prediction, limits in itertools.product(["epsilon", "sample", "v_prediction"], LIMITS)
]
STEPS = [
    1, 2, 4, 50, {"timesteps": [999, 500, 20]}, {"num_inference_steps": 4, "strength": 0.5},
    {"num_inference_steps": 60, "original_inference_steps": 100},
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare):
    for steps in STEPS:
        ours, theirs = OURS(**CASES[index]), THEIRS(**CASES[index])
        compare(ours, theirs, steps, stochastic=True)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.num_inference_steps == theirs.num_inference_steps


@pytest.mark.parametrize("steps", [999, 1000])
def test_long_trajectories_are_those_of_diffusers(steps, compare):
    config = {"original_inference_steps": 1000}
    compare(OURS(**config), THEIRS(**config), steps, stochastic=True)


@pytest.mark.parametrize("begin", [1, 3])
def test_a_run_may_begin_in_the_middle(begin, compare):
    compare(OURS(), THEIRS(), 4, begin=begin, stochastic=True)


def test_every_number_of_steps():
    ours, theirs = OURS(), THEIRS()
    for original, strength in itertools.product([10, 50, 333, 1000], [0.3, 0.75, 1.0]):
        for steps in range(1, int(original * strength) + 1, 1 + original // 40):
            for scheduler in (ours, theirs):
                scheduler.set_timesteps(steps, original_inference_steps=original, strength=strength)
            assert torch.equal(ours.timesteps, theirs.timesteps)


def test_a_part_of_given_time_steps():
    """Where strength leaves out the first ones, the run still ends without noise."""
    scheduler = OURS()
    scheduler.set_timesteps(timesteps=[999, 759, 500, 259], strength=0.5)
    assert scheduler.timesteps.tolist() == [500, 259]
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()
    last = scheduler.step(output, 259, sample)
    assert torch.equal(last.prev_sample, last.denoised)


def test_step_outputs():
    scheduler = OURS()
    scheduler.set_timesteps(4)
    sample, output, noise = torch.randn(3, 2, 3, 4, 4).unbind()
    result = scheduler.step(output, 759, sample, variance_noise=noise)
    assert isinstance(result, LCMSchedulerOutput)
    previous, denoised = scheduler.step(
        output, torch.tensor([759]), sample, return_dict=False, variance_noise=noise
    )
    assert torch.equal(previous, result.prev_sample)
    assert torch.equal(denoised, result.denoised)
    both = torch.tensor([759, 259])
    rows = scheduler.step(output, both, sample, variance_noise=noise).prev_sample
    assert torch.equal(rows[0], result.prev_sample[0])
    last = scheduler.step(output, 259, sample).prev_sample
    torch.testing.assert_close(rows[1], last[1])


def test_bad_calls_are_named():
    scheduler = OURS()
    sample = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ConfigError, match="set_timesteps"):
        scheduler.step(sample, 999, sample)
    for arguments, name in [
        ({}, "exactly one"),
        ({"num_inference_steps": 4, "timesteps": [3]}, "exactly one"),
        ({"num_inference_steps": 51}, "num_inference_steps: got 51; accepted: at most 50"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 4, "original_inference_steps": 1001}, "original_inference_steps"),
        ({"num_inference_steps": 4, "strength": 1.5}, "strength"),
        ({"timesteps": [3, 4]}, "timesteps"),
    ]:
        with pytest.raises(ConfigError, match=name):
            scheduler.set_timesteps(**arguments)
    with pytest.raises(ConfigError, match="timestep_scaling"):
        OURS(timestep_scaling=-1.0)
    with pytest.raises(ConfigError, match="original_inference_steps"):
        OURS(original_inference_steps=0)
