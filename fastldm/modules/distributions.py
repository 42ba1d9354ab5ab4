"""Posteriors over latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def randn_like(
    like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of `like`.

    With a list of generators, one for each row of the batch, a row's numbers do not depend on the
    other rows. A generator of another device draws there, so that a CPU seed gives the same
    numbers on every device.
    """
    if isinstance(generator, Sequence):
        if len(generator) != like.shape[0]:
            raise ValueError(
                f"generator: {len(generator)} generators for a batch of {like.shape[0]}"
            )
        rows = zip(like.split(1), generator, strict=True)
        return torch.cat([randn_like(row, row_generator) for row, row_generator in rows])
    device = like.device if generator is None else generator.device
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device)
    return noise.to(like.device)


class DiagonalGaussianDistribution:
    """N(mean, diag(exp(logvar))) with the log-variance clamped to [−30, 20].

    Args:
        parameters: [B, 2C, *spatial], the mean and the log-variance one after the other.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """A reparameterised sample, [B, C, *spatial]."""
        return self.mean + self.std * randn_like(self.mean, generator)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self ‖ other) in nats, summed over all but the batch: [B].

        `other` is the standard normal where it is None. Half precision is computed in float32.
        """
        mean, logvar = _at_least_float32(self.mean), _at_least_float32(self.logvar)
        if other is None:
            terms = mean.square() + logvar.exp() - 1.0 - logvar
        else:
            other_logvar = _at_least_float32(other.logvar)
            difference = mean - _at_least_float32(other.mean)
            terms = (
                difference.square() * torch.exp(-other_logvar)
                + torch.exp(logvar - other_logvar)
                - 1.0
                - logvar
                + other_logvar
            )
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor) -> Tensor:
        """−log density of `sample` in nats, summed over all but the batch: [B]."""
        mean, logvar = _at_least_float32(self.mean), _at_least_float32(self.logvar)
        terms = math.log(2.0 * math.pi) + logvar + (sample - mean).square() * torch.exp(-logvar)
        return 0.5 * terms.flatten(1).sum(1)


class PointDistribution:
    """All mass at one latent: the "posterior" of a plain autoencoder, with no KL term.

    Args:
        parameters: the latent, [B, C, *spatial].
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean = parameters
        self.std = self.var = torch.zeros_like(parameters)
        self.logvar = torch.full_like(parameters, -math.inf)

    def sample(
        self, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """The latent itself."""
        return self.mean

    def mode(self) -> Tensor:
        """The latent itself."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Zeros, [B]: a plain autoencoder has no such term."""
        return torch.zeros(len(self.mean), device=self.mean.device)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
