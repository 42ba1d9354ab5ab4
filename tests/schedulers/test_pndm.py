"""`PNDMScheduler` against diffusers' scheduler and CompVis's PLMS sampler."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import PNDMScheduler

SPACINGS = ["leading", "linspace", "trailing"]
CASES = list(itertools.product([True, False], ["epsilon", "v_prediction"], SPACINGS, [True, False]))
BETAS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"trained_betas": np.linspace(0.001, 0.015, 1000).tolist()},
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare):
    skip, prediction_type, spacing, to_one = CASES[index]
    config = {
        "skip_prk_steps": skip,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "set_alpha_to_one": to_one,
        "steps_offset": index % 2,
        **BETAS[index % len(BETAS)],
    }
    ours, theirs = PNDMScheduler(**config), diffusers.PNDMScheduler(**config)
    for steps in [1, 2, 5, 20] if skip else [4, 5, 20]:
        compare(ours, theirs, steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)


def test_trajectories_of_a_cosine_schedule(compare):
    # Its ᾱ_T is 2e-9; diffusers' form of the step loses as many digits of a predicted v there.
    config = {"beta_schedule": "squaredcos_cap_v2", "skip_prk_steps": True}
    compare(PNDMScheduler(**config), diffusers.PNDMScheduler(**config), 20)


@pytest.mark.parametrize(("skip", "steps"), [(True, 1000), (False, 999)])
def test_long_trajectories_are_those_of_diffusers(skip, steps, compare):
    config = {"skip_prk_steps": skip, **BETAS[1]}
    compare(PNDMScheduler(**config), diffusers.PNDMScheduler(**config), steps)


@pytest.mark.parametrize("begin", [1, 7, 18])
def test_a_run_may_begin_in_the_middle(begin, compare):
    config = {"skip_prk_steps": True, "steps_offset": 1, **BETAS[1]}
    compare(PNDMScheduler(**config), diffusers.PNDMScheduler(**config), 20, begin=begin)


@pytest.mark.parametrize("steps", [1, 2, 4, 50, 400])
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_compvis_sampler_in_float64(steps, spacing):
    """CompVis's PLMS sampler, written from its formulas, with η = 0."""
    alphas = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    visited = np.arange(0, 1000, 1000 // steps) + 1
    if spacing == "quad":
        visited = np.unique((np.linspace(0, np.sqrt(800), steps) ** 2).astype(int) + 1)
    alphas_prev = np.concatenate(([alphas[0]], alphas[visited[:-1]]))
    evaluated = []

    def predict(x, timestep):
        evaluated.append(timestep)
        return np.sin(x + 0.01 * timestep)

    def step(x, e, index):
        a, a_prev = alphas[visited[index]], alphas_prev[index]
        original = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
        return np.sqrt(a_prev) * original + np.sqrt(1 - a_prev) * e

    x = np.random.default_rng(0).standard_normal((1, 2, 3, 3))
    sample, earlier = torch.from_numpy(x), []
    for index in range(len(visited))[::-1]:
        e = predict(x, visited[index])
        if not earlier:
            following = predict(step(x, e, index), visited[max(index - 1, 0)])
            combined = (e + following) / 2
        elif len(earlier) == 1:
            combined = (3 * e - earlier[-1]) / 2
        elif len(earlier) == 2:
            combined = (23 * e - 16 * earlier[-1] + 5 * earlier[-2]) / 12
        else:
            combined = (55 * e - 59 * earlier[-1] + 37 * earlier[-2] - 9 * earlier[-3]) / 24
        x = step(x, combined, index)
        earlier = [*earlier, e][-3:]
    scheduler = PNDMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        timestep_spacing=spacing,
        schedule_dtype="float64",
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == evaluated
    for timestep in scheduler.timesteps:
        output = torch.sin(sample + 0.01 * float(timestep))
        sample = scheduler.step(output, timestep, sample).prev_sample
    np.testing.assert_allclose(sample.numpy(), x, rtol=1e-10, atol=1e-10)


def test_time_steps_on_the_device_give_the_same(trajectory):
    """A time step as a tensor [1] is looked up without being read."""
    scheduler = PNDMScheduler(skip_prk_steps=True)
    want = trajectory(scheduler, 10)[0]
    scheduler.set_timesteps(10)
    sample = want[0]
    for timestep, expected in zip(scheduler.timesteps, want[1:], strict=True):
        output = torch.sin(0.8 * sample + 0.01 * float(timestep)) + 0.1 * torch.tanh(sample)
        sample, *others = scheduler.step(output, timestep[None], sample, return_dict=False)
        assert not others
        assert torch.equal(sample, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_outputs_are_combined_in_float32(dtype):
    scheduler, exact = PNDMScheduler(skip_prk_steps=True), PNDMScheduler(skip_prk_steps=True)
    sample = torch.randn(2, 3, 4, 4).to(dtype)
    for one in (scheduler, exact):
        one.set_timesteps(10)
    for timestep in scheduler.timesteps[:5]:
        output = torch.randn(2, 3, 4, 4).to(dtype)
        half = scheduler.step(output, timestep, sample).prev_sample
        full = exact.step(output.double(), timestep, sample.double()).prev_sample
        assert half.dtype == dtype
        torch.testing.assert_close(half.double(), full, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_bad_calls_are_named():
    sample = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"prediction_type.*'sample'.*v_prediction"):
        PNDMScheduler(prediction_type="sample")
    with pytest.raises(ConfigError, match="set_timesteps"):
        PNDMScheduler().step(sample, 10, sample)
    with pytest.raises(ConfigError, match="num_inference_steps: got 3; accepted: at least 4"):
        PNDMScheduler().set_timesteps(3)
    scheduler = PNDMScheduler(skip_prk_steps=True)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(10)
    with pytest.raises(ConfigError, match="timestep"):
        scheduler.step(sample, 1000, sample)
