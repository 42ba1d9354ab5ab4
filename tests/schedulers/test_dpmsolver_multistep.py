"""`DPMSolverMultistepScheduler` against diffusers' scheduler, which rounds samples to float32."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import DPMSolverMultistepScheduler

OURS, THEIRS = DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [
    SD,
    {"beta_schedule": "linear"},
    {"trained_betas": np.linspace(0.001, 0.015, 1000).tolist()},
]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["linspace", "leading", "trailing"]
ALGORITHMS = [
    (algorithm, order, solver)
    for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    for order in (1, 2, 3)
    for solver in ("midpoint", "heun")
    if (algorithm, order) != ("sde-dpmsolver", 3)
]
CASES = [
    {
        "algorithm_type": algorithm,
        "solver_order": order,
        "solver_type": solver,
        "prediction_type": PREDICTIONS[(index // 2 + index) % 3],
        "timestep_spacing": SPACINGS[(index // 3) % 3],
        "steps_offset": index % 2,
        "lower_order_final": index % 5 != 0,
        "euler_at_final": index % 7 == 0,
        "final_sigmas_type": "zero" if "++" in algorithm and index % 2 else "sigma_min",
        "thresholding": index % 4 == 3,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
        **BETAS[index % 3],
    }
    for index, (algorithm, order, solver) in enumerate(ALGORITHMS)
]
CASES += [
    {"use_karras_sigmas": True, **SD},
    {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", **SD},
    {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
    {"use_exponential_sigmas": True, "prediction_type": "v_prediction", **SD},
    {"use_beta_sigmas": True, **SD},
    {"use_lu_lambdas": True, **SD},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **SD},
    {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
    {"lambda_min_clipped": -2.0, "timestep_spacing": "leading", **SD},
    {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing", **SD},
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare, compare_in_float64):
    config = CASES[index]
    for steps in [1, 2, 5, 20]:
        ours, theirs = OURS(**config), THEIRS(**config)
        compare(ours, theirs, steps, bound=1e-5)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-7, atol=0)
    noise = {"draws_outside": True} if ours.is_stochastic else {}
    compare_in_float64(OURS, THEIRS, config, 20, bound=1e-11, **noise)


@pytest.mark.parametrize(("index", "steps"), [(2, 999), (9, 999), (24, 1000)])
def test_long_trajectories_are_those_of_diffusers(index, steps, compare):
    compare(OURS(**CASES[index]), THEIRS(**CASES[index]), steps, bound=1e-5)


@pytest.mark.parametrize("config", [{"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}],
                         ids=str)  # fmt: skip
def test_as_many_steps_as_time_steps(config, trajectory):
    """Two of them are rounded to the same time step, where diffusers divides by zero."""
    long, longer = (trajectory(OURS(**config, **SD), steps)[0][-1] for steps in (999, 1000))
    assert bool(longer.isfinite().all())
    if "algorithm_type" not in config:
        torch.testing.assert_close(long, longer, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("begin", [1, 5, 18, 19])
@pytest.mark.parametrize("index", [2, 4, 9, 13])
def test_a_run_may_begin_in_the_middle(index, begin, compare):
    compare(OURS(**CASES[index]), THEIRS(**CASES[index]), 20, begin=begin, bound=1e-5)


def test_given_time_steps(compare):
    steps = {"timesteps": [900, 500, 33]}
    compare(OURS(solver_order=3, **SD), THEIRS(solver_order=3, **SD), steps, bound=1e-5)


def test_given_noise_levels_are_those_of_their_time_steps(trajectory):
    """diffusers takes none here."""
    scheduler = OURS(**SD)
    want = trajectory(scheduler, {"timesteps": [900, 500, 33]})[0]
    levels = scheduler.sigmas.tolist()
    got = trajectory(scheduler, {"sigmas": levels})[0]
    assert scheduler.timesteps.tolist() == [900, 500, 33]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range", "fixed_small"])
def test_a_predicted_variance_is_left_out(variance_type, compare):
    config = {"variance_type": variance_type, **SD}
    compare(OURS(**config), THEIRS(**config), 5, bound=1e-5)


@pytest.mark.parametrize("index", [2, 8, 13])
def test_guidance_inside_the_step_is_guidance_before_it(index):
    inside, before = OURS(**CASES[index]), OURS(**CASES[index])
    samples = [torch.randn(2, 3, 4, 4, dtype=torch.float64)] * 2
    for scheduler in (inside, before):
        scheduler.set_timesteps(6)
    for timestep in inside.timesteps:
        cond, uncond, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64).unbind()
        options = {"variance_noise": noise} if inside.is_stochastic else {}
        guided = uncond + 3.0 * (cond - uncond)
        samples = [
            inside.step(cond, timestep, samples[0], model_output_uncond=uncond,
                        guidance_scale=3.0, **options).prev_sample,
            before.step(guided, timestep, samples[1], **options).prev_sample,
        ]  # fmt: skip
        torch.testing.assert_close(*samples, rtol=1e-10, atol=1e-10)


def test_names_of_other_solvers_stand_for_the_closest():
    given = {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"}
    config, theirs = OURS(**given).config, THEIRS(**given).config
    for name in ("algorithm_type", "solver_type"):
        assert config[name] == theirs[name]


def test_bad_fields_are_named():
    for field, value in {
        "solver_order": 4, "algorithm_type": "dpm", "solver_type": "rk4", "variance_type": "small",
        "final_sigmas_type": "one", "use_flow_sigmas": True, "use_dynamic_shifting": True,
        "timestep_spacing": "uniform", "prediction_type": "flow_prediction",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=field):
            OURS(**{field: value})
    with pytest.raises(ConfigError, match=r"final_sigmas_type.*sigma_min"):
        OURS(algorithm_type="dpmsolver")
    with pytest.raises(ConfigError, match="solver_order"):
        OURS(algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min")
    with pytest.raises(ConfigError, match="use_karras_sigmas, use_beta_sigmas"):
        OURS(use_karras_sigmas=True, use_beta_sigmas=True)
