"""`EulerAncestralDiscreteScheduler` against diffusers' scheduler, which computes in float32."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch

from fastldm.schedulers import EulerAncestralDiscreteScheduler

OURS, THEIRS = EulerAncestralDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [SD, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
CASES = [
    {"prediction_type": prediction, "timestep_spacing": spacing, **BETAS[index % 3]}
    for index, (prediction, spacing) in enumerate(
        itertools.product(["epsilon", "v_prediction"], ["leading", "linspace", "trailing"])
    )
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare, compare_in_float64):
    config = CASES[index]
    for steps in [1, 2, 5, 20, 50]:
        compare(OURS(**config), THEIRS(**config), steps, bound=1e-5, stochastic=True)
    compare_in_float64(OURS, THEIRS, config, 20, bound=1e-11)


@pytest.mark.parametrize(("prediction_type", "steps"), [("epsilon", 1000), ("v_prediction", 999)])
def test_long_trajectories_are_those_of_diffusers(prediction_type, steps, compare):
    config = {"prediction_type": prediction_type, **SD}
    compare(OURS(**config), THEIRS(**config), steps, bound=1e-5, stochastic=True)


def test_a_model_of_the_sample(trajectory):
    """diffusers has no such model here; the same trajectory as with the ε that it stands for."""
    by_sample, by_noise = OURS(prediction_type="sample", **SD), OURS(**SD)
    sample, original, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64).unbind()
    for scheduler in (by_sample, by_noise):
        scheduler.set_timesteps(5)
    sigma = by_noise.sigmas[1].double()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    timestep = by_noise.timesteps[1]
    sample = original + sigma * noise
    got = by_sample.step(original, timestep, sample, generators[0])
    want = by_noise.step(noise, timestep, sample, generators[1])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("begin", [1, 19])
def test_a_run_may_begin_in_the_middle(begin, compare):
    compare(OURS(**SD), THEIRS(**SD), 20, begin=begin, bound=1e-5, stochastic=True)


def test_terminal_snr_of_zero(trajectory, compare):
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    compare(OURS(**config, **SD), THEIRS(**config, **SD), 20, bound=1e-5, stochastic=True)
    # With this schedule the stand-in for ᾱ_T = 0 is above ᾱ_{T−1}, which gives diffusers NaN.
    assert bool(trajectory(OURS(**config), 1000)[0].isfinite().all())


def test_generators_one_a_sample():
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()

    def step(samples, seeds):
        scheduler = OURS(**SD)
        scheduler.set_timesteps(10)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        timestep = scheduler.timesteps[3]
        return scheduler.step(output[samples], timestep, sample[samples], generators).prev_sample

    both = step(slice(0, 2), [3, 8])
    for row, seed in enumerate([3, 8]):
        assert torch.equal(step(slice(row, row + 1), [seed]), both[row : row + 1])
