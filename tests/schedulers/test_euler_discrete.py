"""`EulerDiscreteScheduler` against diffusers' scheduler, which computes in float32."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import EulerDiscreteScheduler

OURS, THEIRS = EulerDiscreteScheduler, diffusers.EulerDiscreteScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [
    SD,
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
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
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0, **SD},
    {"use_exponential_sigmas": True, "prediction_type": "v_prediction", **SD},
    {"use_beta_sigmas": True, **SD},
    {"final_sigmas_type": "sigma_min", **SD},
    {"interpolation_type": "log_linear", **SD},
    {"prediction_type": "v_prediction", "timestep_type": "continuous", **SD},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **SD},
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare, compare_in_float64):
    config = CASES[index]
    for steps in [1, 2, 5, 20, 50]:
        ours, theirs = OURS(**config), THEIRS(**config)
        compare(ours, theirs, steps, bound=1e-5)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-7, atol=0)
        assert ours.init_noise_sigma == theirs.init_noise_sigma
    # diffusers keeps these two schedules in float32 whatever the default.
    if "interpolation_type" not in config and "timestep_type" not in config:
        compare_in_float64(OURS, THEIRS, config, 20)


@pytest.mark.parametrize(("prediction_type", "steps"), [("epsilon", 1000), ("v_prediction", 999)])
def test_long_trajectories_are_those_of_diffusers(prediction_type, steps, compare):
    config = {"prediction_type": prediction_type, **SD}
    compare(OURS(**config), THEIRS(**config), steps, bound=1e-5)


@pytest.mark.parametrize("steps", [
    {"timesteps": [900, 500, 33]}, {"timesteps": [800.5, 3.25]}, {"sigmas": [10.0, 3.0, 0.5, 0.0]},
    {"sigmas": [5.0, 1.0]},
], ids=str)  # fmt: skip
def test_given_time_steps_and_noise_levels(steps, compare):
    compare(OURS(**SD), THEIRS(**SD), steps, bound=1e-5)


@pytest.mark.parametrize("churn", [
    {"s_churn": 5.0}, {"s_churn": 80.0, "s_noise": 1.01, "s_tmin": 0.1, "s_tmax": 5.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_churned_trajectories_are_those_of_diffusers(
    prediction_type, churn, trajectory, assert_equal_trajectories
):
    config = {"prediction_type": prediction_type, **SD}
    for dtype in (torch.float32, torch.float64):
        got, want = (trajectory(cls(**config), 20, dtype, **churn) for cls in (OURS, THEIRS))
        assert_equal_trajectories(got, want, 1e-5)


@pytest.mark.parametrize("begin", [1, 7, 19])
def test_a_run_may_begin_in_the_middle(begin, compare):
    compare(OURS(**SD), THEIRS(**SD), 20, begin=begin, bound=1e-5)


def test_half_precision_is_rounded_once():
    scheduler, exact = OURS(**SD), OURS(**SD)
    sample = 10 * torch.randn(2, 3, 4, 4).half()
    output = torch.randn(2, 3, 4, 4).half()
    for one in (scheduler, exact):
        one.set_timesteps(10)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    options = {"s_churn": 2.0}
    half = scheduler.step(output, 999.0, sample, generator=generators[0], **options)
    noise = torch.randn(sample.shape, generator=generators[1], dtype=torch.float16)
    sigma, following = exact.sigmas[:2].double()
    raised = sigma * (1 + 2.0 / 10)
    start = sample.double() + (raised**2 - sigma**2).sqrt() * noise.double()
    want = start + output.double() * (following - raised)
    assert half.prev_sample.dtype == torch.float16
    torch.testing.assert_close(half.prev_sample.double(), want, rtol=1e-3, atol=1e-3)


def test_step_outputs():
    scheduler = OURS(**SD)
    sample, output = torch.randn(2, 2, 3, 4, 4).unbind()
    scheduler.set_timesteps(10)
    result = scheduler.step(output, scheduler.timesteps[0], sample)
    scheduler.set_timesteps(10)
    as_tuple = scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], result.prev_sample)
    assert torch.equal(as_tuple[1], result.pred_original_sample)


def test_bad_fields_are_named():
    with pytest.raises(ConfigError, match="interpolation_type"):
        OURS(interpolation_type="cubic")
    with pytest.raises(ConfigError, match="timestep_type"):
        OURS(timestep_type="dense")
