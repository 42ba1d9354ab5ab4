"""The forward process and its posterior against CompVis's formulas, in numpy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.losses import GaussianDiffusion
from fastldm.schedulers import DDPMScheduler

T = 1000
TIMESTEPS = np.array([0, 1, 2, 499, 998, 999])
BETAS = np.linspace(0.0015**0.5, 0.0195**0.5, T) ** 2
BARS = np.cumprod(1 - BETAS)
PREVIOUS = np.append(1.0, BARS[:-1])


def diffusion(prediction_type: str = "epsilon", v_posterior: float = 0.0) -> GaussianDiffusion:
    scheduler = DDPMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        schedule_dtype="float64",
    )
    return GaussianDiffusion(scheduler.alphas_cumprod, prediction_type, v_posterior)


def at(table: np.ndarray) -> np.ndarray:
    return table[TIMESTEPS].reshape(-1, 1, 1, 1)


@pytest.fixture
def arrays() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    return tuple(random.standard_normal((3, len(TIMESTEPS), 2, 3, 4)))


def tensors(*values: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(value.copy()) for value in values]


def same(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-13)


def test_q_sample_and_its_moments(arrays):
    x0, noise, _ = arrays
    x0_t, noise_t, t = tensors(x0, noise, TIMESTEPS)
    found = diffusion().q_sample(x0_t, t, noise_t)
    same(found, at(np.sqrt(BARS)) * x0 + at(np.sqrt(1.0 - BARS)) * noise)
    moments = diffusion().q_mean_variance(x0_t, t)
    same(moments.mean, at(np.sqrt(BARS)) * x0)
    same(moments.variance, at(1.0 - BARS))
    same(moments.log_variance, at(np.log(1.0 - BARS)))


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_posterior(arrays, v):
    x0, x_t, _ = arrays
    found = diffusion(v_posterior=v).q_posterior(*tensors(x0, x_t, TIMESTEPS))
    variance = (1 - v) * BETAS * (1.0 - PREVIOUS) / (1.0 - BARS) + v * BETAS
    of_x0 = BETAS * np.sqrt(PREVIOUS) / (1.0 - BARS)
    of_xt = (1.0 - PREVIOUS) * np.sqrt(1.0 - BETAS) / (1.0 - BARS)
    same(found.mean, at(of_x0) * x0 + at(of_xt) * x_t)
    same(found.variance, at(variance))
    same(found.log_variance, at(np.log(np.maximum(variance, 1e-20))))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_range", [None, 0.7])
def test_reverse_step_of_a_prediction(arrays, kind, clip_range):
    output, x_t, x0 = arrays
    t = torch.from_numpy(TIMESTEPS)
    process = diffusion(kind)
    a, s = at(np.sqrt(BARS)), at(np.sqrt(1.0 - BARS))
    start = {
        "epsilon": np.sqrt(1.0 / at(BARS)) * x_t - np.sqrt(1.0 / at(BARS) - 1) * output,
        "sample": output,
        "v_prediction": a * x_t - s * output,
    }[kind]
    same(process.predict_start(*tensors(output, x_t), t), start)
    if clip_range is not None:
        start = np.clip(start, -clip_range, clip_range)
    of_x0 = BETAS * np.sqrt(PREVIOUS) / (1.0 - BARS)
    of_xt = (1.0 - PREVIOUS) * np.sqrt(1.0 - BETAS) / (1.0 - BARS)
    found = process.p_mean_variance(*tensors(output, x_t), t, clip_range)
    same(found.mean, at(of_x0) * start + at(of_xt) * x_t)
    recovered = process.predict_noise(*tensors(x0, a * x0 + s * output), t)
    np.testing.assert_allclose(recovered.numpy(), output, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_what_gives_the_start_back(arrays, kind):
    x0, noise, _ = tensors(*arrays)
    t = torch.from_numpy(TIMESTEPS)
    process = diffusion(kind)
    x_t = process.q_sample(x0, t, noise)
    found = process.predict_start(process.target(x0, noise, t), x_t, t)
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_round_float64_tables_once(arrays, dtype):
    x0, noise, _ = (tensor.to(dtype) for tensor in tensors(*arrays))
    t = torch.from_numpy(TIMESTEPS)
    process = diffusion("v_prediction")
    exact = process.target(x0.double(), noise.double(), t)
    found = process.target(x0, noise, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=3e-7)
    assert process.q_sample(x0, t, noise).dtype == dtype


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match=r"prediction_type: expected .*, got 'flow'"):
        diffusion("flow")
    with pytest.raises(ConfigError, match=r"v_posterior: expected a number in \[0, 1\], got 2"):
        diffusion(v_posterior=2)
