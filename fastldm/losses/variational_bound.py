"""The variational bound of a diffusion model in bits/dim, term by term, with rate and distortion.

−log p(x₀) ≤ L_T + Σ_t L_{t−1} + L_0 (Ho et al., 2006.11239, eq. 5; Nichol and Dhariwal,
2102.09672, eq. 4–7): the prior's KL, a KL between Gaussians for each step, and the decoder's
likelihood. Sent from T downwards the terms are the rate of a progressive code, and the error of the
x₀ predicted at each step is its distortion (2006.11239, section 4.3). Time steps count from 0, as
everywhere in this library: T − 1 is the noisiest, and step 0 leads from the least noise to x₀.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastldm.errors import ConfigError, DataError
from fastldm.losses.gaussian_diffusion import GaussianDiffusion, posterior_variance

Likelihood = Literal["discretized", "gaussian"]
ReverseVariance = Literal["fixed_small", "fixed_large"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""From x_t [B, …] and time steps int64 [B] to ε, x₀ or v [B, …]."""

_HALF_LEVEL = 1.0 / 255.0
"""Half the distance between neighbours of the 256 levels in [−1, 1]."""
_OFF_LEVEL = 1e-3
_NATS_PER_BIT = math.log(2.0)


@dataclass(frozen=True)
class BoundTerms:
    """The terms of the bound of each sample, in bits/dim; their sum is the bound.

    Attributes:
        prior: L_T, [B].
        timesteps: where the steps' terms were taken, int64 [K, B], from the noisiest on; the last
            row is 0.
        steps: the terms of the steps, [K, B]; the last row is L_0. With fewer rows than T, each is
            an estimate of the sum over its group of neighbouring steps.
        rates: the bits/dim that make x_t known at those time steps, [K, B]: L_T and every later
            step's term above it.
        squared_errors: mean squared error of the x₀ that is predicted there, [K, B].
    """

    prior: Tensor
    timesteps: Tensor
    steps: Tensor
    rates: Tensor
    squared_errors: Tensor

    @property
    def decoder(self) -> Tensor:
        """L_0, [B]."""
        return self.steps[-1]

    @property
    def total(self) -> Tensor:
        """The bound, [B]."""
        return self.prior + self.steps.sum(0)

    def rate_distortion(self) -> tuple[Tensor, Tensor]:
        """Rate in bits/dim and root-mean-squared error, means over the samples, [K] each."""
        return self.rates.mean(1), self.squared_errors.mean(1).sqrt()


class VariationalBound:
    """The bound for one noise schedule and prediction type; computed in float64.

    The model's own output is taken as it comes: give the model float64 weights to have all of the
    bound in float64.

    Args:
        alphas_cumprod: ᾱ, [T], strictly falling in (0, 1).
        prediction_type: ``"epsilon"``, ``"sample"`` (x₀) or ``"v_prediction"`` (2202.00512).
        likelihood: L_0. ``"discretized"``: x₀ holds one of the 256 levels of [−1, 1] in each
            dimension, and the decoder's Gaussian is integrated over the level, the outermost ones
            to infinity (2006.11239, eq. 13). ``"gaussian"``: x₀ is continuous, as latents are, and
            L_0 is minus the logarithm of the Gaussian's density. Such a bound changes with the
            scale of x₀, may be negative, and does not compare with that of pixels; differences of
            it on the same latents do.
        variance: of the reverse steps: ``"fixed_small"`` β̃_t, ``"fixed_large"`` β_t
            (2006.11239, section 3.2). Step 0, where β̃ is 0, has β̃ of step 1.
        clip_sample: clamp the predicted x₀ to [−1, 1], as is usual for pixels.

    Raises:
        ConfigError: an argument is not among those accepted.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
        *,
        likelihood: Likelihood = "discretized",
        variance: ReverseVariance = "fixed_small",
        clip_sample: bool = False,
    ) -> None:
        for name, value, accepted in (
            ("likelihood", likelihood, get_args(Likelihood)),
            ("variance", variance, get_args(ReverseVariance)),
        ):
            if value not in accepted:
                raise ConfigError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")
        alpha = alphas_cumprod.detach().to("cpu", torch.float64)
        falls = alpha.ndim == 1 and bool((alpha.diff() < 0).all())
        if not falls or len(alpha) < 2 or not 0 < float(alpha[-1]) < float(alpha[0]) < 1:
            raise ConfigError(
                "alphas_cumprod: expected at least two strictly falling numbers in (0, 1); a "
                "schedule that reaches 0 has no finite bound"
            )
        self.likelihood = likelihood
        self.clip_sample = clip_sample
        self._diffusion = GaussianDiffusion(alpha, prediction_type)
        smallest = posterior_variance(alpha)
        chosen = smallest if variance == "fixed_small" else posterior_variance(alpha, 1.0)
        self._variance = torch.cat([smallest[1:2], chosen[1:]])

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self._diffusion.num_timesteps

    def prior(self, x0: Tensor) -> Tensor:
        """L_T: the KL of q(x_{T−1} | x₀) from a standard normal, in bits/dim.

        Args:
            x0: [B, …].

        Returns:
            [B], float64.
        """
        last = torch.full((len(x0),), self.num_timesteps - 1)
        mean, variance, log_variance = self._diffusion.q_mean_variance(x0.double(), last)
        return _bits_per_dim(0.5 * (mean.square() + variance - 1 - log_variance))

    def predicted_x0(self, model_output: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """x₀ from the model's output, clamped where `clip_sample` says so; float64 [B, …]."""
        x0 = self._diffusion.predict_start(model_output.double(), x_t.double(), timesteps)
        return x0.clamp(-1.0, 1.0) if self.clip_sample else x0

    def step(self, x0: Tensor, x_t: Tensor, x0_hat: Tensor, timesteps: Tensor) -> Tensor:
        """One step's term in bits/dim: L_0 where the time step is 0, else L_{t−1}.

        Args:
            x0: [B, …].
            x_t: a sample of q(x_t | x₀), [B, …].
            x0_hat: from `predicted_x0`, [B, …].
            timesteps: int64 [B].

        Returns:
            [B], float64.

        Raises:
            DataError: the likelihood is discretised and x₀ lies between the levels.
        """
        x0, x_t = x0.double(), x_t.double()
        variance = self._variance[timesteps.cpu()].to(x0.device).view(-1, *[1] * (x0.ndim - 1))
        true = self._diffusion.q_posterior(x0, x_t, timesteps)
        mean = self._diffusion.q_posterior(x0_hat.double(), x_t, timesteps).mean
        ratio = true.variance / variance
        # Step 0 has a true variance of 0 and takes the decoder's term in place of this one.
        log_ratio = torch.where(ratio > 0, ratio, torch.ones_like(ratio)).log()
        kl = 0.5 * ((true.mean - mean).square() / variance + ratio - 1 - log_ratio)
        first = (timesteps == 0).to(x0.device)
        if not first.any():
            return _bits_per_dim(kl)
        nats = kl.expand_as(x0).clone()
        nats[first] = self._decoder_nats(x0[first], mean[first], variance[first])
        return _bits_per_dim(nats)

    def _decoder_nats(self, x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if self.likelihood == "gaussian":
            return 0.5 * ((x0 - mean).square() / variance + torch.log(2 * math.pi * variance))
        return -discretized_gaussian_log_likelihood(x0, mean, variance.sqrt())

    @torch.no_grad()
    def terms(
        self,
        predict: Predict,
        x0: Tensor,
        *,
        num_groups: int | None = None,
        generator: torch.Generator | None = None,
        squared_error: Callable[[Tensor], Tensor] | None = None,
    ) -> BoundTerms:
        """All terms of a batch, each with one draw of x_t.

        Args:
            predict: the model, from x_t and time steps to its output; called once a group.
            x0: [B, …].
            num_groups: None takes every step. Else the steps above 0 are parted into so many
                groups of neighbours, which grow with t², and each sample draws one step a group,
                whose term times the group's size estimates the group's sum without bias.
            generator: draws noise and steps, on its own device.
            squared_error: from the predicted x₀ to its mean squared error [B]; by default that to
                `x0`. For latents: of the decoded images.

        Raises:
            ConfigError: `num_groups` is not in [1, T − 1].
            DataError: see `step`.
        """
        rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        known = self.prior(x0)
        prior = known
        for low, high in self._groups(num_groups):
            device = x0.device if generator is None else generator.device
            timesteps = torch.randint(low, high, (len(x0),), generator=generator, device=device).to(
                x0.device
            )
            noise = torch.randn(x0.shape, generator=generator, device=device, dtype=torch.float64)
            x_t = self._diffusion.q_sample(x0.double(), timesteps, noise.to(x0.device)).to(x0)
            x0_hat = self.predicted_x0(predict(x_t, timesteps), x_t, timesteps)
            term = self.step(x0, x_t, x0_hat, timesteps)
            if squared_error is None:
                error = (x0.double() - x0_hat).square().flatten(1).mean(1)
            else:
                error = squared_error(x0_hat.to(x0)).double()
            rows.append(
                (timesteps, term * (high - low), known + term * (high - 1 - timesteps), error)
            )
            known = known + term * (high - low)
        return BoundTerms(prior, *(torch.stack(column) for column in zip(*rows, strict=True)))

    def _groups(self, num_groups: int | None) -> Iterator[tuple[int, int]]:
        """Ranges of time steps, from the noisiest down to [0, 1)."""
        above_zero = self.num_timesteps - 1
        count = above_zero if num_groups is None else num_groups
        if not 1 <= count <= above_zero:
            raise ConfigError(f"num_groups: expected 1 to T − 1 = {above_zero}, got {num_groups}")
        edges = [1]
        for number in range(1, count + 1):
            # At least one step a group, and enough left for those that follow.
            wanted = 1 + round(above_zero * (number / count) ** 2)
            edges.append(max(edges[-1] + 1, min(wanted, above_zero + 1 - (count - number))))
        yield from zip(edges[-2::-1], edges[:0:-1], strict=True)
        yield 0, 1


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Logarithm of the probability of each of 256 levels of [−1, 1] under a Gaussian.

    The Gaussian is integrated over ±1/255 around the level, and to infinity beyond the outermost
    ones (2006.11239, eq. 13), in a form that keeps its digits far from the mean.

    Args:
        x: levels 2k/255 − 1, any shape, float64.
        mean, std: of the Gaussian, broadcastable against `x`.

    Returns:
        Nats, the shape of `x`.

    Raises:
        DataError: `x` holds other values.
    """
    level = (x + 1) * 127.5
    off = (level - level.round()).abs()
    if x.numel() and (float(off.max()) > _OFF_LEVEL or float(level.min()) < -_OFF_LEVEL
                      or float(level.max()) > 255 + _OFF_LEVEL):  # fmt: skip
        raise DataError(
            "likelihood 'discretized' takes the 256 levels 2k/255 − 1, got other values; round x₀ "
            "to them, or take 'gaussian' for continuous data"
        )
    lower = (x - _HALF_LEVEL - mean) / std
    upper = (x + _HALF_LEVEL - mean) / std
    # Mirrored where both lie above the mean: there the two distribution functions are near 1.
    mirrored = lower > 0
    low = torch.where(mirrored, -upper, lower)
    high = torch.where(mirrored, -lower, upper)
    log_high = torch.special.log_ndtr(high)
    inside = log_high + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - log_high))
    lowest = torch.special.log_ndtr(upper)
    highest = torch.special.log_ndtr(-lower)
    return torch.where(level < 0.5, lowest, torch.where(level > 254.5, highest, inside))


def _bits_per_dim(nats: Tensor) -> Tensor:
    """[B, …] → [B]."""
    return nats.flatten(1).mean(1) / _NATS_PER_BIT
