"""`DDPMScheduler` against diffusers' scheduler."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import DDPMScheduler, DDPMSchedulerOutput

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
SPACINGS = ["leading", "linspace", "trailing"]
LIMITS = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.9},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
]
# diffusers takes the root of a negative logarithm for "fixed_large_log", so it has no figure there.
VARIANCE_TYPES = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
BETAS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "laplace"},
    {"trained_betas": np.linspace(0.001, 0.03, 1000).tolist()},
]
STEPS = [1, 2, 3, 7, 50]
CASES = list(itertools.product(PREDICTION_TYPES, SPACINGS, LIMITS, VARIANCE_TYPES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, dtype, trajectory, assert_equal_trajectories):
    prediction_type, spacing, limits, variance_type = CASES[index]
    config = {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "variance_type": variance_type,
        "steps_offset": index % 2,
        "rescale_betas_zero_snr": index % 4 == 0 and prediction_type != "epsilon",
        **BETAS[index % len(BETAS)],
        **limits,
    }
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    steps = STEPS[index // 3 % len(STEPS)]
    assert_equal_trajectories(trajectory(ours, steps, dtype), trajectory(theirs, steps, dtype))


@pytest.mark.parametrize("steps", [999, 1000])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_long_trajectories_are_those_of_diffusers(
    prediction_type, steps, trajectory, assert_equal_trajectories
):
    config = {"prediction_type": prediction_type, "beta_schedule": "scaled_linear"}
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    assert_equal_trajectories(
        trajectory(ours, steps, torch.float64), trajectory(theirs, steps, torch.float64)
    )


def test_fixed_large_log_is_fixed_large(trajectory, assert_equal_trajectories):
    runs = [
        trajectory(DDPMScheduler(variance_type=name), 7, torch.float64)
        for name in ("fixed_large_log", "fixed_large")
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("timesteps", [[999, 500, 20, 3], [0], [7, 0]])
def test_custom_timesteps(timesteps):
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    sample = torch.randn(2, 3, 4, 4)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=timesteps)
        assert scheduler.timesteps.tolist() == timesteps
    for timestep, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        assert ours.previous_timestep(timestep) == following
        results = [
            scheduler.step(
                sample.cos(), timestep, sample, generator=torch.Generator().manual_seed(1)
            )
            for scheduler in (ours, theirs)
        ]
        torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)
        sample = results[0].prev_sample


def test_without_set_timesteps_it_walks_the_training_schedule():
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    assert torch.equal(ours.timesteps, theirs.timesteps)
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()
    for timestep in (999, 400, 1, 0):
        results = [
            scheduler.step(output, timestep, sample, torch.Generator().manual_seed(2))
            for scheduler in (ours, theirs)
        ]
        torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)


def test_timesteps_may_be_replaced():
    """Image-to-image code assigns the time steps that are left."""
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        scheduler.timesteps = scheduler.timesteps[[4, 6, 9]]
    for timestep in ours.timesteps:
        results = [
            scheduler.step(output, timestep, sample, torch.Generator().manual_seed(2))
            for scheduler in (ours, theirs)
        ]
        torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)


def test_step_outputs_and_positional_signature():
    scheduler = DDPMScheduler()
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()
    result = scheduler.step(output, 10, sample, torch.Generator().manual_seed(0))
    assert isinstance(result, DDPMSchedulerOutput)
    as_tuple = scheduler.step(output, 10, sample, torch.Generator().manual_seed(0), False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], result.prev_sample)
    assert torch.equal(as_tuple[1], result.pred_original_sample)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_guidance_inside_the_step_is_guidance_before_it(variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type)
    channels = 6 if variance_type == "learned_range" else 3
    cond, uncond = torch.randn(2, 2, channels, 4, 4, dtype=torch.float64).unbind()
    sample, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind()
    inside = scheduler.step(
        cond, 300, sample, model_output_uncond=uncond, guidance_scale=3.0, variance_noise=noise
    )
    guided = torch.cat((uncond[:, :3] + 3.0 * (cond - uncond)[:, :3], cond[:, 3:]), dim=1)
    before = scheduler.step(guided, 300, sample, variance_noise=noise)
    for got, want in zip(inside, before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_time_steps_of_a_batch_are_steps_of_its_samples():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    sample, output, noise = torch.randn(3, 3, 3, 4, 4).unbind()
    timesteps = torch.tensor([900, 300, 0])
    together = scheduler.step(output, timesteps, sample, variance_noise=noise)
    for row, timestep in enumerate(timesteps):
        one = slice(row, row + 1)
        alone = scheduler.step(output[one], timestep, sample[one], variance_noise=noise[one])
        assert torch.equal(together.prev_sample[one], alone.prev_sample)
    unvisited = scheduler.step(output, torch.tensor([900, 301, 0]), sample, variance_noise=noise)
    assert bool(unvisited.prev_sample[1].isnan().all())
    assert not bool(unvisited.prev_sample[[0, 2]].isnan().any())


def test_bad_calls_are_named():
    scheduler = DDPMScheduler()
    sample = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ConfigError, match="exactly one"):
        scheduler.set_timesteps()
    with pytest.raises(ConfigError, match="exactly one"):
        scheduler.set_timesteps(10, timesteps=[1, 0])
    with pytest.raises(ConfigError, match="num_inference_steps"):
        scheduler.set_timesteps(1001)
    for timesteps in ([], [5, 5], [3, 4], [1000, 3], [3, -1]):
        with pytest.raises(ConfigError, match="timesteps"):
            scheduler.set_timesteps(timesteps=timesteps)
    scheduler.set_timesteps(10)
    for timestep in (-1, 301, 1000, torch.tensor(301)):
        with pytest.raises(ConfigError, match="timestep"):
            scheduler.step(sample, timestep, sample)
    learned = DDPMScheduler(variance_type="learned")
    with pytest.raises(ConfigError, match=r"model_output: got 3 channels; accepted: 6"):
        learned.step(sample, 10, sample)
    with pytest.raises(ConfigError, match=r"variance_type.*'tiny'.*fixed_large_log"):
        DDPMScheduler(variance_type="tiny")
