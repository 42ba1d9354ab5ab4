"""`UniPCMultistepScheduler` against diffusers' scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import UniPCMultistepScheduler

OURS, THEIRS = UniPCMultistepScheduler, diffusers.UniPCMultistepScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [SD, {"beta_schedule": "linear"}]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["linspace", "leading", "trailing"]
SOLVERS = [
    (predict_x0, order, solver)
    for predict_x0 in (True, False)
    for order in (1, 2, 3, 4)
    for solver in ("bh1", "bh2")
]
CASES = [
    {
        "predict_x0": predict_x0,
        "solver_order": order,
        "solver_type": solver,
        "prediction_type": PREDICTIONS[(index // 2 + index) % 3],
        "timestep_spacing": SPACINGS[(index // 3) % 3],
        "lower_order_final": index % 3 != 0 or solver == "bh2",
        "disable_corrector": [0, 2] if index % 4 == 0 else [],
        # diffusers gives NaN at σ = 0 with bh1 and with ε.
        "final_sigmas_type": "zero" if predict_x0 and solver == "bh2" else "sigma_min",
        "thresholding": predict_x0 and index % 4 == 3,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
        **BETAS[index % 2],
    }
    for index, (predict_x0, order, solver) in enumerate(SOLVERS)
]
CASES += [
    {"use_karras_sigmas": True, **SD},
    {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min", **SD},
    {"use_beta_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0, **SD},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **SD},
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare, compare_in_float64):
    config = CASES[index]
    for steps in [1, 2, 5, 20]:
        ours, theirs = OURS(**config), THEIRS(**config)
        compare(ours, theirs, steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)
    compare_in_float64(OURS, THEIRS, config, 20)


@pytest.mark.parametrize(("prediction_type", "steps"), [("epsilon", 999), ("v_prediction", 500)])
def test_long_trajectories_are_those_of_diffusers(prediction_type, steps, compare):
    config = {"prediction_type": prediction_type}
    compare(OURS(**config, **SD), THEIRS(**config, **SD), steps)


@pytest.mark.parametrize("begin", [1, 5, 19])
@pytest.mark.parametrize("index", [3, 5, 11])
def test_a_run_may_begin_in_the_middle(index, begin, compare):
    compare(OURS(**CASES[index]), THEIRS(**CASES[index]), 20, begin=begin)


@pytest.mark.parametrize("config", [
    {"solver_type": "bh1"}, {"predict_x0": False}, {"solver_order": 3, "lower_order_final": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_runs_to_zero_noise_end_at_the_predicted_sample(config, steps, trajectory):
    """diffusers gives NaN, the product of a zero and an infinite factor."""
    scheduler = OURS(**config, **SD, schedule_dtype="float64")
    samples = trajectory(scheduler, steps, torch.float64)[0]
    assert bool(samples.isfinite().all())
    usual = OURS(**SD, schedule_dtype="float64")
    if steps == 1:
        torch.testing.assert_close(samples, trajectory(usual, 1, torch.float64)[0])


def test_guidance_inside_the_step_is_guidance_before_it():
    for config in (CASES[3], CASES[11], CASES[13]):
        inside, before = OURS(**config), OURS(**config)
        samples = [torch.randn(2, 3, 4, 4, dtype=torch.float64)] * 2
        for scheduler in (inside, before):
            scheduler.set_timesteps(6)
        for timestep in inside.timesteps:
            cond, uncond = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind()
            samples = [
                inside.step(cond, timestep, samples[0], model_output_uncond=uncond,
                            guidance_scale=3.0).prev_sample,
                before.step(uncond + 3.0 * (cond - uncond), timestep, samples[1]).prev_sample,
            ]  # fmt: skip
            torch.testing.assert_close(*samples, rtol=1e-10, atol=1e-10)


def test_names_of_other_solvers_stand_for_the_default():
    assert OURS(solver_type="logrho").config.solver_type == "bh2"


def test_bad_fields_are_named():
    for field, value in {
        "solver_order": 9, "solver_type": "bh3", "solver_p": object(), "shift_terminal": 0.1,
        "use_flow_sigmas": True,
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=field):
            OURS(**{field: value})
