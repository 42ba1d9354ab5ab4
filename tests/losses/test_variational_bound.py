from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fastldm.errors import ConfigError, DataError
from fastldm.losses import VariationalBound
from fastldm.losses.variational_bound import discretized_gaussian_log_likelihood
from fastldm.schedulers import DDPMScheduler

T = 12


def schedule(steps: int = T) -> Tensor:
    return torch.linspace(0.999, 0.02, steps, dtype=torch.float64).sqrt()


def pixels(*shape: int) -> Tensor:
    levels = torch.randint(0, 256, shape).double()
    levels[0] = torch.tensor([0.0, 255.0]).repeat(levels[0].numel() // 2).view(levels[0].shape)
    return levels * 2 / 255 - 1


class TinyModel(nn.Module):
    """A float64 network of x_t and t, far from a good denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.9 * x + 0.1 * self.conv(x).tanh() + 0.02 * t.to(x).view(-1, 1, 1, 1)


def bound_by_distributions(
    model: Any, alphas: Tensor, prediction_type: str, variance: str, x0: Tensor, seed: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The terms in nats a sample, by torch's distributions and Bayes' rule, in its own loop."""
    generator = torch.Generator().manual_seed(seed)
    T = len(alphas)
    a = [float(value) for value in alphas]
    previous = [1.0, *a[:-1]]
    small = [(1 - a[t] / previous[t]) * (1 - previous[t]) / (1 - a[t]) for t in range(T)]
    small[0] = small[1]
    end = Normal(math.sqrt(a[-1]) * x0, math.sqrt(1 - a[-1]))
    prior = kl_divergence(end, Normal(torch.zeros_like(x0), 1.0)).flatten(1).sum(1)
    terms, errors = [], []
    for t in reversed(range(T)):
        torch.randint(t, t + 1, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        x_t = math.sqrt(a[t]) * x0 + math.sqrt(1 - a[t]) * noise
        output = model(x_t, torch.full((len(x0),), t))
        if prediction_type == "epsilon":
            guess = (x_t - math.sqrt(1 - a[t]) * output) / math.sqrt(a[t])
        elif prediction_type == "sample":
            guess = output
        else:
            guess = math.sqrt(a[t]) * x_t - math.sqrt(1 - a[t]) * output
        errors.append((guess - x0).square().flatten(1).mean(1))
        step = a[t] / previous[t]
        beta = 1 - step
        sigma = math.sqrt(beta if variance == "fixed_large" and t > 0 else small[t])
        if t == 0:
            # q(x_0 | x_t = first noising, x0 = guess) has the mean `guess` itself.
            cdf = Normal(guess, sigma).cdf
            low = torch.where(x0 < -0.999, torch.zeros_like(x0), cdf(x0 - 1 / 255))
            high = torch.where(x0 > 0.999, torch.ones_like(x0), cdf(x0 + 1 / 255))
            terms.append(-(high - low).log().flatten(1).sum(1))
        else:
            # Product of N(x_{t−1}; √ᾱ_{t−1}·x₀, 1−ᾱ_{t−1}) and N(x_t; √α_t·x_{t−1}, β_t).
            precision = 1 / (1 - previous[t]) + step / beta

            means = [
                (math.sqrt(previous[t]) * x / (1 - previous[t]) + math.sqrt(step) * x_t / beta)
                / precision
                for x in (x0, guess)
            ]
            kl = kl_divergence(Normal(means[0], precision**-0.5), Normal(means[1], sigma))
            terms.append(kl.flatten(1).sum(1))
    return prior, terms, torch.stack(errors)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_term_is_that_of_an_independent_computation(
    prediction_type: str, variance: Any
) -> None:
    # A first step with as much noise as a level keeps the plain difference of cdfs above 0.
    alphas = schedule() * 0.95
    model, x0 = TinyModel(), pixels(3, 3, 4, 4)
    with torch.no_grad():
        prior, terms, errors = bound_by_distributions(
            model, alphas, prediction_type, variance, x0, seed=3
        )
    bound = VariationalBound(alphas, prediction_type, variance=variance)
    found = bound.terms(model, x0, generator=torch.Generator().manual_seed(3))
    scale = x0[0].numel() * math.log(2)
    torch.testing.assert_close(found.prior, prior / scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.steps, torch.stack(terms) / scale, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.squared_errors, errors, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.total, (prior + sum(terms)) / scale, rtol=1e-9, atol=0)
    assert found.timesteps[:, 0].tolist() == list(reversed(range(T)))


def test_the_bound_is_the_sum_of_its_terms_and_the_rate_of_what_came_before() -> None:
    bound = VariationalBound(schedule())
    found = bound.terms(TinyModel(), pixels(2, 3, 4, 4))
    torch.testing.assert_close(found.total, found.prior + found.steps.sum(0))
    torch.testing.assert_close(found.rates[0], found.prior)
    torch.testing.assert_close(found.rates[-1] + found.decoder, found.total)
    torch.testing.assert_close(found.rates[1:] - found.rates[:-1], found.steps[:-1])
    rate, distortion = found.rate_distortion()
    assert rate.shape == distortion.shape == (T,)
    assert (rate.diff() >= 0).all()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_gaussian_data_with_its_best_denoiser_has_the_closed_form(
    prediction_type: str, variance: Any
) -> None:
    """x₀ ~ N(0, s²): the terms' expectations, and a bound just above the entropy."""
    s2 = 0.3
    alphas = DDPMScheduler(num_train_timesteps=200, beta_end=0.1).alphas_cumprod.double()

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        a = alphas[t].view(-1, 1)
        x0 = a.sqrt() * s2 / (a * s2 + 1 - a) * x_t
        if prediction_type == "sample":
            return x0
        noise = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        return noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0

    x0 = math.sqrt(s2) * torch.randn(64, 512, dtype=torch.float64)
    bound = VariationalBound(alphas, prediction_type, likelihood="gaussian", variance=variance)
    found = bound.terms(predict, x0)

    a = alphas.flip(0)
    previous = torch.cat([alphas[:-1].flip(0), torch.ones(1, dtype=torch.float64)])
    error = s2 * (1 - a) / (a * s2 + 1 - a)
    torch.testing.assert_close(found.squared_errors.mean(1), error, rtol=0.05, atol=0)
    # KL of two Gaussians whose means are √ᾱ_prev·β/(1−ᾱ)·(x₀ − x̂₀) apart, at all steps but 0.
    beta = (1 - a / previous)[:-1]
    true = beta * ((1 - previous) / (1 - a))[:-1]
    sigma2 = true if variance == "fixed_small" else beta
    apart = (previous.sqrt() * (1 - a / previous) / (1 - a)).square() * error
    kl = 0.5 * ((apart[:-1] + true) / sigma2 - 1 - (true / sigma2).log()) / math.log(2)
    torch.testing.assert_close(found.steps[:-1].mean(1), kl, rtol=0.05, atol=1e-6)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s2)
    assert found.total.mean() > entropy
    if variance == "fixed_large":
        # Nearly the variance of the true reverse steps, which β̃ is not for data that has a spread.
        assert found.total.mean() < entropy + 0.1


def test_groups_of_steps_estimate_the_same_sum() -> None:
    alphas = DDPMScheduler(num_train_timesteps=100, beta_end=0.15).alphas_cumprod.double()
    x0 = pixels(1, 1, 2, 2).expand(20_000, 1, 2, 2)
    bound = VariationalBound(alphas)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.9 * x_t

    every = bound.terms(predict, x0[:2000])
    some = bound.terms(predict, x0, num_groups=7)
    assert some.steps.shape == (8, 20_000)
    assert some.total.mean() == pytest.approx(float(every.total.mean()), rel=0.03)
    assert some.rates[-1].mean() == pytest.approx(float(every.rates[-1].mean()), rel=0.03)
    # Each draws its own steps, and all groups together hold every step once.
    assert some.timesteps[-1].unique().tolist() == [0]
    assert len(some.timesteps.unique()) == 100
    one = bound.terms(predict, x0[:4], num_groups=99)
    assert one.timesteps[:, 0].tolist() == list(reversed(range(100)))


def test_the_levels_have_a_probability_of_one_and_keep_their_digits() -> None:
    levels = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
    for mean, std in ((0.1, 0.3), (-1.4, 0.01), (0.99, 2.0), (0.0, 0.004)):
        chance = discretized_gaussian_log_likelihood(
            levels, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        )
        assert chance.exp().sum() == pytest.approx(1, abs=1e-12)
        assert chance.isfinite().all()
    # Twenty deviations away on either side, where a difference of distribution functions is 0.
    far = [
        discretized_gaussian_log_likelihood(
            *torch.tensor([[side * 101 / 255], [0.0], [0.02]]).double()
        )
        for side in (-1, 1)
    ]
    assert far[0] == pytest.approx(float(far[1]), rel=1e-12)
    assert -0.5 * 20**2 - 6 < float(far[0]) < -0.5 * 19**2


def test_clamping_and_a_distortion_of_ones_own() -> None:
    x0 = pixels(2, 3, 4, 4)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x_t, 3.0)

    bound = VariationalBound(schedule(), "sample", clip_sample=True)
    found = bound.terms(predict, x0, squared_error=lambda x: x.flatten(1).mean(1) * 7)
    assert (found.squared_errors == 7).all()
    plain = VariationalBound(schedule(), "sample").terms(predict, x0)
    assert plain.squared_errors.min() > found.squared_errors.min() / 7


def test_single_precision_of_model_and_data() -> None:
    model, x0 = TinyModel(), pixels(2, 3, 4, 4)
    bound = VariationalBound(schedule())
    exact = bound.terms(model, x0, generator=torch.Generator().manual_seed(0))
    model.float()
    rough = bound.terms(model, x0.float(), generator=torch.Generator().manual_seed(0))
    assert rough.total.dtype == torch.float64
    torch.testing.assert_close(rough.total, exact.total, rtol=1e-4, atol=0)


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match=r"prediction_type: expected one of .* got 'noise'"):
        VariationalBound(schedule(), "noise")
    with pytest.raises(ConfigError, match="likelihood: expected one of"):
        VariationalBound(schedule(), likelihood="bce")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alphas_cumprod: expected at least two"):
        VariationalBound(torch.tensor([0.9, 0.5, 0.0]))
    bound = VariationalBound(schedule())
    with pytest.raises(ConfigError, match=r"num_groups: expected 1 to T − 1 = 11, got 12"):
        bound.terms(TinyModel(), pixels(1, 3, 2, 2), num_groups=12)
    with pytest.raises(DataError, match="256 levels"):
        bound.terms(TinyModel(), torch.full((1, 3, 2, 2), 0.001, dtype=torch.float64))
