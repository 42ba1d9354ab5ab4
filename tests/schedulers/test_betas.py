"""Noise schedules against their definitions and diffusers'."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import make_betas, rescale_zero_terminal_snr
from fastldm.schedulers.betas import BETA_SCHEDULES

START, END, TOTAL = 0.0015, 0.0195, 1000
POSITION = np.linspace(0, 1, TOTAL)


def cosine_alpha_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


DEFINITIONS = {
    "linear": START + (END - START) * POSITION,
    "scaled_linear": (START**0.5 + (END**0.5 - START**0.5) * POSITION) ** 2,
    "sqrt": (START + (END - START) * POSITION) ** 0.5,
    "sigmoid": START + (END - START) / (1 + np.exp(6 - 12 * POSITION)),
    "squaredcos_cap_v2": np.array([
        min(1 - cosine_alpha_bar((t + 1) / TOTAL) / cosine_alpha_bar(t / TOTAL), 0.999)
        for t in range(TOTAL)
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINITIONS)
def test_schedules_are_their_definitions(name):
    betas = make_betas(name, START, END, TOTAL, dtype=torch.float64)
    np.testing.assert_allclose(betas.numpy(), DEFINITIONS[name], rtol=1e-12)


@pytest.mark.parametrize("total", [1, 10, 1000])
@pytest.mark.parametrize("name", sorted(set(BETA_SCHEDULES) - {"sqrt"}))
def test_schedules_are_those_of_diffusers(name, total):
    scheduler = diffusers.HeunDiscreteScheduler if name == "exp" else diffusers.DDPMScheduler
    theirs = scheduler(total, START, END, name).betas
    assert torch.equal(make_betas(name, START, END, total), theirs)


def test_trained_betas():
    values = np.linspace(0.1, 0.2, 7)
    for given in (values, values.tolist()):
        betas = make_betas("linear", START, END, 7, given)
        assert torch.equal(betas, torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr(name):
    betas = make_betas(name, START, END, TOTAL, dtype=torch.float64)
    before, after = ((1 - b).cumprod(0).sqrt() for b in (betas, rescale_zero_terminal_snr(betas)))
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0])
    # An affine map of √ᾱ: differences keep their ratio.
    ratio = (after[1:] - after[:-1]) / (before[1:] - before[:-1])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-8, atol=0)


def test_bad_values_are_named():
    with pytest.raises(ConfigError, match=r"beta_schedule.*'quadratic'.*scaled_linear"):
        make_betas("quadratic", START, END, TOTAL)
    with pytest.raises(ConfigError, match=r"beta_start: got -0\.1"):
        make_betas("scaled_linear", -0.1, END, TOTAL)
    with pytest.raises(ConfigError, match=r"beta_end: got 1\.5"):
        make_betas("linear", START, 1.5, TOTAL)
    with pytest.raises(ConfigError, match="trained_betas: got 2 values"):
        make_betas("linear", START, END, TOTAL, [0.1, 0.2])
    for wrong in (-0.5, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="trained_betas"):
            make_betas("linear", START, END, 2, [0.1, wrong])
