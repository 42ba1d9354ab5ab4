"""Posteriors against torch.distributions and diffusers'."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as TheirDistribution
from torch.distributions import Independent, Normal, kl_divergence

from fastldm.modules.distributions import (
    DiagonalGaussianDistribution,
    PointDistribution,
    randn_like,
)


@pytest.fixture
def parameters() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, 4, 5, generator=generator, dtype=torch.float64)


def normal(posterior: DiagonalGaussianDistribution) -> Independent:
    return Independent(Normal(posterior.mean, posterior.std), 3)


def test_divergences_and_densities_are_torch_s(parameters):
    p = DiagonalGaussianDistribution(parameters)
    q = DiagonalGaussianDistribution(parameters.flip(0) * 1.3)
    x = p.sample()
    standard = Independent(Normal(torch.zeros_like(x), torch.ones_like(x)), 3)
    torch.testing.assert_close(p.kl(), kl_divergence(normal(p), standard))
    torch.testing.assert_close(p.kl(q), kl_divergence(normal(p), normal(q)))
    torch.testing.assert_close(p.nll(x), -normal(p).log_prob(x))


def test_samples_are_diffusers_for_the_same_seed(parameters):
    given = DiagonalGaussianDistribution(parameters).sample(torch.Generator().manual_seed(5))
    expected = TheirDistribution(parameters).sample(torch.Generator().manual_seed(5))
    assert torch.equal(given, expected)


def test_one_generator_a_row_makes_rows_independent_of_the_batch(parameters):
    seeds = (1, 2, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    together = DiagonalGaussianDistribution(parameters).sample(generators)
    for row, seed in enumerate(seeds):
        single = DiagonalGaussianDistribution(parameters[row : row + 1])
        alone = single.sample(torch.Generator().manual_seed(seed))
        assert torch.equal(together[row : row + 1], alone)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn_like(parameters, generators[:2])


def test_samples_have_the_mean_and_deviation():
    parameters = torch.tensor([[2.0, math.log(9.0)]]).repeat(20_000, 1)[:, :, None, None]
    x = DiagonalGaussianDistribution(parameters).sample(torch.Generator().manual_seed(0))
    assert abs(float(x.mean()) - 2.0) < 0.1
    assert abs(float(x.std()) - 3.0) < 0.1


def test_the_gradient_reaches_mean_and_log_variance(parameters):
    parameters.requires_grad_()
    posterior = DiagonalGaussianDistribution(parameters)
    sample = posterior.sample(torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(sample, parameters, torch.ones_like(sample))
    noise = randn_like(posterior.mean, torch.Generator().manual_seed(1))
    assert torch.equal(gradient[:, :4], torch.ones_like(noise))
    torch.testing.assert_close(gradient[:, 4:], 0.5 * posterior.std * noise)


def test_the_log_variance_is_clamped():
    posterior = DiagonalGaussianDistribution(torch.tensor([[0.0, 0.0, -1e4, 1e4]])[..., None])
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.isfinite(posterior.kl()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_divergence_of_half_precision_is_computed_in_float32(parameters, dtype):
    large = (parameters * 20).to(dtype)
    given = DiagonalGaussianDistribution(large).kl()
    assert given.dtype == torch.float32
    expected = DiagonalGaussianDistribution(large.double()).kl()
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=0.0)


def test_a_point_has_no_spread_and_no_divergence(parameters):
    point = PointDistribution(parameters)
    assert point.sample() is point.mode() is point.mean
    assert torch.equal(point.std, torch.zeros_like(parameters))
    assert torch.equal(point.logvar.exp(), point.var)
    assert torch.equal(point.kl(), torch.zeros(3))
