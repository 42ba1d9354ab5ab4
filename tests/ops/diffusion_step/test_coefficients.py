"""The packed scalars of the steps, against the papers' formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.ops.diffusion_step.coefficients import (
    VARIANCE_TYPES,
    DDIMCoefficient,
    DDPMCoefficient,
    ddim_coefficients,
    ddpm_coefficients,
)

ALPHAS = [(0.9, 0.99), (0.3, 0.5), (1e-4, 2e-4), (0.999, 1.0), (0.0, 0.01)]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("alpha", "alpha_prev"), ALPHAS)
def test_ddim_scalars(alpha, alpha_prev, eta):
    row = ddim_coefficients(
        torch.tensor(alpha, dtype=torch.float64), torch.tensor(alpha_prev, dtype=torch.float64), eta
    )
    sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
    expected = {
        DDIMCoefficient.SQRT_ALPHA: math.sqrt(alpha),
        DDIMCoefficient.SQRT_BETA: math.sqrt(1 - alpha),
        DDIMCoefficient.SQRT_ALPHA_PREV: math.sqrt(alpha_prev),
        DDIMCoefficient.DIRECTION: math.sqrt(1 - alpha_prev - sigma**2),
        DDIMCoefficient.SIGMA: sigma,
    }
    assert row.shape == (len(DDIMCoefficient),)
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-12, abs=1e-14), name


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize(("alpha", "alpha_prev"), ALPHAS)
def test_ddpm_scalars(alpha, alpha_prev, variance_type):
    row = ddpm_coefficients(
        torch.tensor(alpha, dtype=torch.float64),
        torch.tensor(alpha_prev, dtype=torch.float64),
        variance_type,
    )
    step = alpha / alpha_prev
    small = max((1 - alpha_prev) / (1 - alpha) * (1 - step), 1e-20)
    sigma = {"small": math.sqrt(small), "large": math.sqrt(1 - step)}
    expected = {
        DDPMCoefficient.SQRT_ALPHA: math.sqrt(alpha),
        DDPMCoefficient.SQRT_BETA: math.sqrt(1 - alpha),
        DDPMCoefficient.ORIGINAL: math.sqrt(alpha_prev) * (1 - step) / (1 - alpha),
        DDPMCoefficient.SAMPLE: math.sqrt(step) * (1 - alpha_prev) / (1 - alpha),
        DDPMCoefficient.SIGMA: sigma.get(variance_type.split("_")[1], 1.0)
        if variance_type.startswith("fixed")
        else 1.0,
        DDPMCoefficient.LOG_VARIANCE_MIN: math.log(small),
        DDPMCoefficient.LOG_VARIANCE_MAX: math.log(1 - step),
    }
    assert row.shape == (len(DDPMCoefficient),)
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-11, abs=1e-14), name


def test_a_schedule_is_packed_row_by_row():
    alpha = torch.linspace(0.99, 0.01, 6)
    alpha_prev = torch.cat((torch.ones(1), alpha[:-1]))
    noisy = torch.arange(6) > 0
    ddim, ddpm = (
        ddim_coefficients(alpha, alpha_prev, 0.5),
        ddpm_coefficients(alpha, alpha_prev, "fixed_large", noisy),
    )
    for step in range(6):
        assert torch.equal(ddim[step], ddim_coefficients(alpha[step], alpha_prev[step], 0.5))
        assert torch.equal(
            ddpm[step],
            ddpm_coefficients(alpha[step], alpha_prev[step], "fixed_large", bool(noisy[step])),
        )
    assert ddpm[0, DDPMCoefficient.SIGMA] == 0
    assert bool((ddpm[1:, DDPMCoefficient.SIGMA] > 0).all())


def test_bad_values_are_named():
    alpha = torch.tensor(0.5)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="eta"):
            ddim_coefficients(alpha, alpha, eta)
    with pytest.raises(ConfigError, match=r"variance_type.*'huge'.*learned_range"):
        ddpm_coefficients(alpha, alpha, "huge")
