"""`DDIMScheduler` against diffusers' scheduler and against the paper's formulas."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.ops import ddim_step
from fastldm.schedulers import DDIMScheduler, DDIMSchedulerOutput

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
SPACINGS = ["leading", "linspace", "trailing"]
LIMITS = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.9},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
]
BETAS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.03, 1000)},
]
STEPS = [1, 2, 3, 7, 50]
CASES = list(itertools.product(PREDICTION_TYPES, SPACINGS, LIMITS, [0.0, 0.8], [False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, dtype, trajectory, assert_equal_trajectories):
    prediction_type, spacing, limits, eta, to_one = CASES[index]
    config = {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "set_alpha_to_one": to_one,
        "steps_offset": index % 2,
        "rescale_betas_zero_snr": index % 3 == 0 and prediction_type != "epsilon",
        **BETAS[index % len(BETAS)],
        **limits,
    }
    options = {"eta": eta, "use_clipped_model_output": index % 5 == 0}
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    steps = STEPS[index % len(STEPS)]
    assert_equal_trajectories(
        trajectory(ours, steps, dtype, **options), trajectory(theirs, steps, dtype, **options)
    )


@pytest.mark.parametrize("steps", [999, 1000])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_long_trajectories_are_those_of_diffusers(
    prediction_type, steps, trajectory, assert_equal_trajectories
):
    config = {"prediction_type": prediction_type, "beta_schedule": "scaled_linear"}
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    options = {"eta": 0.5}
    assert_equal_trajectories(
        trajectory(ours, steps, torch.float64, **options),
        trajectory(theirs, steps, torch.float64, **options),
    )


def test_clipped_epsilon_prediction_at_zero_snr(trajectory, assert_equal_trajectories):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    assert float(ours.alphas_cumprod[-1]) == 0
    assert_equal_trajectories(trajectory(ours, 7), trajectory(theirs, 7))


@pytest.mark.parametrize(("steps", "spacing"), [
    (5, "uniform"), (20, "uniform"), (400, "uniform"), (20, "leading"),
    (50, "quad"), (200, "quad"),
])  # fmt: skip
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_compvis_sampler_in_float64(steps, spacing, eta):
    """CompVis's DDIM: schedule in float64, time steps k·⌊T/S⌋ + 1, last ᾱ_prev = ᾱ[0]."""
    alphas = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    visited = np.arange(0, 1000, 1000 // steps) + 1
    if spacing == "quad":
        visited = np.unique((np.linspace(0, np.sqrt(800), steps) ** 2).astype(int) + 1)
    alphas_prev = np.concatenate(([alphas[0]], alphas[visited[:-1]]))
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
        timestep_spacing=spacing,
        schedule_dtype="float64",
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == visited[::-1].tolist()
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, 2, 3, 3))
    sample = torch.from_numpy(x)
    for index, timestep in zip(range(len(visited))[::-1], scheduler.timesteps, strict=True):
        noise = generator.standard_normal(x.shape)
        a, a_prev = alphas[visited[index]], alphas_prev[index]
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        e = np.sin(x + 0.01 * visited[index])
        original = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
        x = np.sqrt(a_prev) * original + np.sqrt(1 - a_prev - sigma**2) * e + sigma * noise
        output = torch.sin(sample + 0.01 * float(timestep))
        variance_noise = torch.from_numpy(noise) if eta else None
        sample = scheduler.step(
            output, timestep, sample, eta=eta, variance_noise=variance_noise
        ).prev_sample
        np.testing.assert_allclose(sample.numpy(), x, rtol=1e-10, atol=1e-10)


def test_step_outputs_and_positional_signature():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    sample, output, noise = torch.randn(3, 2, 3, 4, 4).unbind()
    result = scheduler.step(output, 500, sample, 0.7, True, None, noise)
    assert isinstance(result, DDIMSchedulerOutput)
    as_tuple = scheduler.step(output, 500, sample, 0.7, True, None, noise, False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], result.prev_sample)
    assert torch.equal(as_tuple[1], result.pred_original_sample)
    latest = scheduler.step(output, 500, sample, 0.7, True, None, noise, return_original=False)
    assert torch.equal(latest.prev_sample, result.prev_sample)
    assert latest.pred_original_sample.numel() == 0
    reference = diffusers.DDIMScheduler()
    reference.set_timesteps(4)
    theirs = reference.step(output, 500, sample, 0.7, True, None, noise)
    torch.testing.assert_close(result.prev_sample, theirs.prev_sample)


@pytest.mark.parametrize("scale", [3.0, torch.tensor([1.0, 9.0])], ids=["number", "tensor"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_guidance_inside_the_step_is_guidance_before_it(scale, limits):
    scheduler = DDIMScheduler(**limits)
    scheduler.set_timesteps(10)
    sample, cond, uncond = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64).unbind()
    inside = scheduler.step(
        cond, 300, sample, model_output_uncond=uncond, guidance_scale=scale, guidance_rescale=0.4
    )
    factor = scale.double().reshape(-1, 1, 1, 1) if isinstance(scale, torch.Tensor) else scale
    guided = uncond + factor * (cond - uncond)
    ratio = cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    before = scheduler.step(0.4 * guided * ratio + 0.6 * guided, 300, sample)
    for got, want in zip(inside, before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_seeded_noise_depends_on_seed_and_time_step():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()
    seeds = torch.tensor([4, 9])
    both = scheduler.step(output, 300, sample, eta=1.0, seed=seeds).prev_sample
    for row in range(2):
        one = slice(row, row + 1)
        alone = scheduler.step(output[one], 300, sample[one], eta=1.0, seed=int(seeds[row]))
        assert torch.equal(alone.prev_sample, both[one])
    coefficients = scheduler._coefficients(300, sample, 1.0)
    want = ddim_step(sample, output, coefficients, clip_range=1.0, seed=seeds, offset=300)
    assert torch.equal(both, want.prev_sample)
    for timestep in (torch.tensor(300), torch.tensor([300]), torch.tensor(300, dtype=torch.int32)):
        as_tensor = scheduler.step(output, timestep, sample, eta=1.0, seed=seeds)
        assert torch.equal(as_tensor.prev_sample, both)


def test_generators_one_a_sample():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 8)]

    both = scheduler.step(output, 300, sample, eta=1.0, generator=generators()).prev_sample
    for row, generator in enumerate(generators()):
        one = slice(row, row + 1)
        alone = scheduler.step(output[one], 300, sample[one], eta=1.0, generator=generator)
        assert torch.equal(alone.prev_sample, both[one])


def test_previous_timestep_is_one_stride_back():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    assert scheduler.previous_timestep(300) == 200
    assert scheduler.previous_timestep(0) < 0


def test_bad_calls_are_named():
    scheduler = DDIMScheduler()
    sample = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ConfigError, match="set_timesteps"):
        scheduler.step(sample, 10, sample)
    with pytest.raises(ConfigError, match="set_timesteps"):
        scheduler.step(sample, torch.tensor([10, 10]), sample)
    scheduler.set_timesteps(10)
    for timestep in (-1, 1000, 0.5, torch.tensor(1000), torch.tensor(0.5)):
        with pytest.raises(ConfigError, match="timestep"):
            scheduler.step(sample, timestep, sample)
    with pytest.raises(ConfigError, match="eta"):
        scheduler.step(sample, 10, sample, eta=2.0)
    with pytest.raises(ConfigError, match="model_output"):
        scheduler.step(torch.zeros(2, 6, 4, 4), 10, sample)
    with pytest.raises(ConfigError, match="generator, variance_noise, seed"):
        scheduler.step(sample, 10, sample, eta=1.0, seed=1, variance_noise=sample)
    with pytest.raises(ConfigError, match="generator: got 3"):
        scheduler.step(sample, 10, sample, eta=1.0, generator=[torch.Generator()] * 3)
