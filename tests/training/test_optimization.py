"""Learning rates, clipping, and two optimisers under one gradient scaler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fastldm.errors import CheckpointError, NonFiniteLossError
from fastldm.training.optimization import (
    Stepper,
    build_optimization,
    learning_rate_factor,
    peak_learning_rate,
)

CPU = torch.device("cpu")


@pytest.fixture
def config(autoencoder_config: Callable[..., Any]) -> Any:
    return autoencoder_config(learning_rate=0.1)


def test_schedules(config: Any) -> None:
    warm = replace(config, warmup_steps=4)
    assert [learning_rate_factor(warm, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    for schedule, middle in (("constant", 1.0), ("linear", 0.75), ("cosine", None)):
        entry = replace(config, lr_schedule=schedule)
        expected = 0.5 * (1 + math.cos(math.pi / 4)) if middle is None else middle
        assert learning_rate_factor(entry, 100, 0.25) == pytest.approx(expected)
    floor = replace(config, lr_schedule="linear", min_lr_ratio=0.1)
    assert learning_rate_factor(floor, 100, 1.0) == pytest.approx(0.1)
    assert learning_rate_factor(floor, 100, 0.5) == pytest.approx(0.55)


def test_scale_lr_multiplies_by_the_global_batch(config: Any) -> None:
    scaled = replace(config, scale_lr=True, batch_size=3, gradient_accumulation_steps=5)
    assert peak_learning_rate(scaled, 0.1, 2) == pytest.approx(3.0)
    assert peak_learning_rate(config, 0.1, 2) == 0.1


def parameters_of(config: Any, count: int = 2, **changes: Any) -> tuple[list[nn.Parameter], Any]:
    parameters = [nn.Parameter(torch.full((4,), float(n + 1))) for n in range(count)]
    settings = replace(config, **changes)
    return parameters, [
        build_optimization(f"net{n}", [parameter], settings, 0.1, CPU)
        for n, parameter in enumerate(parameters)
    ]


def test_clipping_is_by_the_norm_of_each_optimiser(config: Any) -> None:
    parameters, optimizations = parameters_of(config, max_grad_norm=1.0)
    stepper = Stepper(CPU, scaled=False)
    stepper.backward((parameters[0] * 100).sum() + (parameters[1] * 0.1).sum())
    logs = stepper.step(optimizations, 1.0, 0)
    assert logs["grad_norm_net0"].item() == pytest.approx(200.0)
    assert logs["grad_norm_net1"].item() == pytest.approx(0.2)
    # Adam's first moment is (1 − β₁)·g: 0.5 in each entry after clipping, 0.1 without.
    moments = [
        entry.optimizer.state[parameter]["exp_avg"] / (1 - config.adam_betas[0])
        for entry, parameter in zip(optimizations, parameters, strict=True)
    ]
    assert moments[0].tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    assert moments[1].tolist() == pytest.approx([0.1] * 4, rel=1e-5)
    assert parameters[0].grad is None


def test_one_scaler_for_two_optimisers(config: Any) -> None:
    """The scale grows in every step here; unscaling the second by the new one would halve it."""
    plain, plain_optimizations = parameters_of(config, adam_eps=1.0)
    scaled, scaled_optimizations = parameters_of(config, adam_eps=1.0)
    steppers = Stepper(CPU, scaled=False), Stepper(CPU, scaled=True)
    steppers[1].scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for step in range(3):
        for stepper, parameters, optimizations in (
            (steppers[0], plain, plain_optimizations),
            (steppers[1], scaled, scaled_optimizations),
        ):
            for parameter in parameters:
                stepper.backward((parameter**2).sum())
            stepper.step(optimizations, 1.0, step)
    assert steppers[1].scaler.get_scale() == 64.0
    for one, two in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


def test_a_scaler_skips_a_step_that_overflows(config: Any) -> None:
    parameters, optimizations = parameters_of(config)
    stepper = Stepper(CPU, scaled=True)
    before = [parameter.detach().clone() for parameter in parameters]
    stepper.backward((parameters[0] * float("inf")).sum() + parameters[1].sum())
    stepper.step(optimizations, 1.0, 0)
    assert torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])


def test_a_gradient_that_is_not_finite_stops_before_anything_moves(config: Any) -> None:
    parameters, optimizations = parameters_of(config)
    stepper = Stepper(CPU, scaled=False)
    stepper.backward(parameters[0].sum() + (parameters[1] * float("nan")).sum())
    with pytest.raises(NonFiniteLossError, match=r"step 12.*net1 is nan"):
        stepper.step(optimizations, 1.0, 12)
    assert bool((parameters[0] == 1).all())


def test_states_come_back_and_foreign_ones_are_refused(config: Any) -> None:
    parameters, optimizations = parameters_of(config)
    stepper = Stepper(CPU, scaled=False)
    stepper.backward(sum((parameter**2).sum() for parameter in parameters))
    stepper.step(optimizations, 1.0, 0)
    state = stepper.state_dict(optimizations)
    _, fresh = parameters_of(config)
    stepper.load_state_dict(state, fresh, "here")
    assert torch.equal(
        next(iter(fresh[1].optimizer.state.values()))["exp_avg"],
        next(iter(optimizations[1].optimizer.state.values()))["exp_avg"],
    )
    wider = build_optimization("net0", [nn.Parameter(torch.ones(5))], config, 0.1, CPU)
    with pytest.raises(CheckpointError, match=r"exp_avg is \[4\], its parameter is \[5\]"):
        stepper.load_state_dict(state, [wider], "here")
    more = build_optimization("net0", [*parameters], config, 0.1, CPU)
    with pytest.raises(CheckpointError, match="net0 optimiser belongs to another architecture"):
        stepper.load_state_dict(state, [more], "here")
    other = build_optimization("other", parameters, config, 0.1, CPU)
    with pytest.raises(CheckpointError, match="no state of the other optimiser"):
        stepper.load_state_dict(state, [other], "here")
