"""`DPMSolverSinglestepScheduler` against diffusers' scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import DPMSolverSinglestepScheduler

OURS, THEIRS = DPMSolverSinglestepScheduler, diffusers.DPMSolverSinglestepScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = [SD, {"beta_schedule": "linear"}]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
ALGORITHMS = [
    (algorithm, order, solver)
    for algorithm in ("dpmsolver++", "dpmsolver")
    for order in (1, 2, 3)
    for solver in ("midpoint", "heun")
]
CASES = [
    {
        "algorithm_type": algorithm,
        "solver_order": order,
        "solver_type": solver,
        "prediction_type": PREDICTIONS[(index // 2 + index) % 3],
        "lower_order_final": index % 2 == 0,
        "final_sigmas_type": "zero" if "++" in algorithm and index % 2 else "sigma_min",
        "thresholding": "++" in algorithm and index % 4 == 3,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
        **BETAS[index % 2],
    }
    for index, (algorithm, order, solver) in enumerate(ALGORITHMS)
]
CASES += [
    {"use_karras_sigmas": True, **SD},
    {"use_exponential_sigmas": True, "prediction_type": "v_prediction", **SD},
    {"use_beta_sigmas": True, **SD},
    {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_trajectories_are_those_of_diffusers(index, compare, compare_in_float64):
    config = CASES[index]
    for steps in [1, 2, 5, 6, 20]:
        ours, theirs = OURS(**config), THEIRS(**config)
        compare(ours, theirs, steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.get_order_list(steps) == theirs.order_list
    compare_in_float64(OURS, THEIRS, config, 20)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_stochastic_trajectories_are_those_of_diffusers(
    order, solver, trajectory, assert_equal_trajectories
):
    config = {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": solver}
    got, want = (trajectory(cls(**config, **SD), 20, torch.float64) for cls in (OURS, THEIRS))
    # The weight of the second derivative is the small difference of two numbers in float32.
    assert_equal_trajectories(got, want, 1e-10)
    if (order, solver) != (3, "heun"):
        assert_equal_trajectories(*(trajectory(cls(**config, **SD), 20) for cls in (OURS, THEIRS)))


@pytest.mark.parametrize(("index", "steps"), [(4, 999), (8, 998)])
def test_long_trajectories_are_those_of_diffusers(index, steps, compare):
    compare(OURS(**CASES[index]), THEIRS(**CASES[index]), steps)


@pytest.mark.parametrize("begin", [1, 2, 3, 17])
@pytest.mark.parametrize("index", [3, 4, 11])
def test_a_run_may_begin_in_the_middle(index, begin, compare):
    compare(OURS(**CASES[index]), THEIRS(**CASES[index]), 18, begin=begin)


def test_given_time_steps(compare):
    steps = {"timesteps": [900, 500, 333, 33]}
    compare(OURS(solver_order=3, **SD), THEIRS(solver_order=3, **SD), steps)


def test_bad_fields_are_named():
    with pytest.raises(ConfigError, match="algorithm_type"):
        OURS(algorithm_type="sde-dpmsolver")
    with pytest.raises(ConfigError, match="final_sigmas_type"):
        OURS(algorithm_type="dpmsolver")
    with pytest.raises(ConfigError, match="use_flow_sigmas"):
        OURS(use_flow_sigmas=True)
