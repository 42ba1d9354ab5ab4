"""Noise schedules of files: recognised, restated bit for bit, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastldm import DDIMScheduler
from fastldm.checkpoints.ldm_params import DiffusionParams
from fastldm.checkpoints.schedule import (
    betas_of,
    is_schedule_of,
    recognise_betas,
    schedule_arguments,
    schedule_buffers,
    scheduler_fields,
)
from fastldm.errors import CheckpointError, ConfigError
from tests.checkpoints.original import schedule


def test_the_buffers_are_the_original_s() -> None:
    fields = scheduler_fields({}, DiffusionParams(linear_start=0.0015, linear_end=0.0195), "file")
    buffers = schedule_buffers(betas_of(DDIMScheduler(**fields).config))
    expected = schedule(0.0015, 0.0195)
    assert list(buffers) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, rtol=2e-7, atol=0.0)
    assert torch.equal(buffers["betas"], expected["betas"])
    assert torch.equal(buffers["alphas_cumprod"], expected["alphas_cumprod"])


def test_the_posterior_variance_may_lean_to_beta() -> None:
    betas = torch.linspace(0.001, 0.02, 10, dtype=torch.float64)
    plain, leaning = schedule_buffers(betas), schedule_buffers(betas, v_posterior=1.0)
    assert torch.equal(leaning["posterior_variance"], betas.float())
    assert plain["posterior_variance"][0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "fields",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "sqrt", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_schedules_are_recognised_from_their_betas(
    fields: dict[str, Any], dtype: torch.dtype
) -> None:
    betas = betas_of(DDIMScheduler(**fields, num_train_timesteps=500).config).to(dtype)
    found = recognise_betas(betas)
    assert found["num_train_timesteps"] == 500
    assert found["beta_schedule"] == fields["beta_schedule"]
    for end in ("beta_start", "beta_end"):
        if end in fields:
            assert found[end] == pytest.approx(fields[end], rel=2e-3)
    if dtype != torch.float16 and fields["beta_schedule"] != "sqrt":
        assert {name: found[name] for name in fields} == fields


def test_other_betas_are_kept_as_they_are() -> None:
    betas = torch.rand(50) * 0.1
    found = recognise_betas(betas)
    assert torch.equal(DDIMScheduler(**found).betas, betas)
    arguments = schedule_arguments(DDIMScheduler(**found).config)
    assert arguments["given_betas"] == betas.double().tolist()


def test_the_file_decides_where_it_differs_from_the_config() -> None:
    params = DiffusionParams(linear_start=0.0015, linear_end=0.0195)
    root = schedule(0.0015, 0.0205)
    fields = scheduler_fields(root, params, "file")
    assert fields["beta_end"] == 0.0205
    assert is_schedule_of(root, DDIMScheduler(**fields).config)
    assert not is_schedule_of(root, DDIMScheduler(beta_schedule="scaled_linear").config)
    assert not is_schedule_of({}, DDIMScheduler().config)


def test_cumulative_alphas_alone_are_enough() -> None:
    root = {"alphas_cumprod": schedule(0.0015, 0.0195)["alphas_cumprod"]}
    fields = scheduler_fields(root, None, "file")
    scheduler = DDIMScheduler(**fields)
    torch.testing.assert_close(
        scheduler.alphas_cumprod.float(), root["alphas_cumprod"], rtol=1e-5, atol=1e-7
    )


def test_the_sampler_is_compvis_s() -> None:
    fields = scheduler_fields(schedule(0.0015, 0.0195), None, "file")
    scheduler = DDIMScheduler(**fields)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert scheduler.alphas_cumprod.dtype == torch.float64


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ({}, "holds no noise schedule"),
        ({"betas": torch.zeros(2, 3)}, "betas is not numbers from 0 to 1"),
        ({"betas": torch.tensor([0.1, float("nan")])}, "betas is not numbers from 0 to 1"),
        ({"betas": torch.tensor([0.1, -0.1])}, "betas is not numbers from 0 to 1"),
        ({"betas": torch.tensor([1, 0])}, "betas is not numbers from 0 to 1"),
        ({"betas": torch.zeros(0)}, "betas is not numbers from 0 to 1"),
        ({"alphas_cumprod": torch.tensor([2.0])}, "alphas_cumprod is not numbers"),
        (
            {"betas": torch.full((5,), 0.1), "alphas_cumprod": torch.full((5,), 0.5)},
            "alphas_cumprod is not that of its betas",
        ),
    ],
)
def test_buffers_of_no_schedule_are_refused(root: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"file: .*{message}"):
        scheduler_fields(root, None, "file")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cosine_s": 0.1, "beta_schedule": "cosine"}, "cosine_s: expected 0.008, got 0.1"),
        ({"beta_schedule": "steps"}, "beta_schedule: .*'steps'"),
        ({"timesteps": 0}, "timesteps: expected 1 to"),
        ({"parameterization": "eta"}, "parameterization: .*'eta'"),
    ],
)
def test_configs_of_no_schedule_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler_fields({}, DiffusionParams(**params), "file")


def test_a_schedule_that_compvis_does_not_have() -> None:
    config = DDIMScheduler(rescale_betas_zero_snr=True).config
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):
        betas_of(config)
