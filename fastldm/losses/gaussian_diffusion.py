"""The forward process, its posterior, and what a prediction of the model says of them.

x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε, with ᾱ_t the noise schedule's ``alphas_cumprod`` (2006.11239).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_SMALLEST_VARIANCE = 1e-20


class Gaussian(NamedTuple):
    """A normal distribution of each value.

    Attributes:
        mean: [B, …].
        variance, log_variance: broadcastable against `mean`.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class GaussianDiffusion:
    """q(x_t | x₀), q(x_{t−1} | x_t, x₀) and p(x_{t−1} | x_t) of one noise schedule.

    The tables are computed in float64. Results have the dtype of the sample, float32 for half
    precision. Time steps are int64 [B] in [0, T).

    Args:
        alphas_cumprod: ᾱ, [T], of a schedule computed in float64 (``schedule_dtype="float64"``)
            where β is to be exact.
        prediction_type: what the model predicts: ``"epsilon"``, ``"sample"`` (x₀) or
            ``"v_prediction"`` (v = √ᾱ·ε − √(1−ᾱ)·x₀, 2202.00512).
        v_posterior: the variance of the posterior is (1−v)·β̃ + v·β, with
            β̃_t = β_t·(1−ᾱ_{t−1})/(1−ᾱ_t).

    Raises:
        ConfigError: the prediction type is unknown, or `v_posterior` lies outside [0, 1].
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
        v_posterior: float = 0.0,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, "
                f"got {prediction_type!r}"
            )
        if not 0 <= v_posterior <= 1:
            raise ConfigError(f"v_posterior: expected a number in [0, 1], got {v_posterior!r}")
        self.prediction_type = prediction_type
        self._tables = _tables(
            alphas_cumprod.detach().to("cpu", torch.float64), prediction_type, v_posterior
        )
        self._cast_tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self._tables["signal"])

    @property
    def vlb_weights(self) -> Tensor:
        """What `vlb_weights` gives, float64 [T] on the CPU."""
        return self._tables["vlb"]

    def q_sample(self, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_t for noise ε, [B, …], rounded once to the dtype of `x0` (2006.11239, eq. 4)."""
        dtype = compute_dtype(x0)
        signal, deviation = self._rows(("signal", "deviation"), timesteps, x0)
        return (signal * x0.to(dtype) + deviation * noise.to(dtype)).to(x0.dtype)

    def q_mean_variance(self, x0: Tensor, timesteps: Tensor) -> Gaussian:
        """q(x_t | x₀)."""
        rows = self._rows(("signal", "noise_variance", "log_noise_variance"), timesteps, x0)
        return Gaussian(rows[0] * x0, rows[1], rows[2])

    def q_posterior(self, x0: Tensor, x_t: Tensor, timesteps: Tensor) -> Gaussian:
        """q(x_{t−1} | x_t, x₀) (2006.11239, eq. 6 and 7).

        The variance of the first step is 0; its logarithm is that of 10⁻²⁰, as CompVis has it.
        """
        of_x0, of_xt, variance, log_variance = self._rows(
            ("posterior_of_x0", "posterior_of_xt", "posterior", "log_posterior"), timesteps, x_t
        )
        return Gaussian(of_x0 * x0 + of_xt * x_t, variance, log_variance)

    def predict_start(self, model_output: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """x̂₀ of a prediction, [B, …]."""
        if self.prediction_type == "sample":
            return model_output
        signal, deviation = self._rows(("signal", "deviation"), timesteps, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - deviation * model_output) / signal
        return signal * x_t - deviation * model_output

    def predict_noise(self, x0: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that leads from x₀ to x_t, [B, …]."""
        signal, deviation = self._rows(("signal", "deviation"), timesteps, x_t)
        return (x_t - signal * x0) / deviation

    def p_mean_variance(
        self,
        model_output: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        clip_range: float | None = None,
    ) -> Gaussian:
        """p(x_{t−1} | x_t): the posterior of x̂₀, which is clipped to ±`clip_range` if given."""
        x0 = self.predict_start(model_output, x_t, timesteps)
        if clip_range is not None:
            x0 = x0.clamp(-clip_range, clip_range)
        return self.q_posterior(x0, x_t, timesteps)

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is to predict from x_t: ε, x₀ or v, [B, …]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        dtype = compute_dtype(x0)
        signal, deviation = self._rows(("signal", "deviation"), timesteps, x0)
        return signal * noise.to(dtype) - deviation * x0.to(dtype)

    def vlb_weights_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """`vlb_weights` at time steps, [B], in the precision and on the device of `like`."""
        return self._rows(("vlb",), timesteps, like)[0].flatten()

    def _rows(self, names: tuple[str, ...], timesteps: Tensor, like: Tensor) -> list[Tensor]:
        """Entries of tables at `timesteps`, each [B, 1, …]."""
        dtype, shape = compute_dtype(like), (-1, *[1] * (like.ndim - 1))
        result = []
        for name in names:
            key = (name, like.device, dtype)
            if key not in self._cast_tables:
                self._cast_tables[key] = self._tables[name].to(like.device, dtype)
            result.append(self._cast_tables[key][timesteps.to(like.device)].reshape(shape))
        return result


def _tables(alphas_cumprod: Tensor, prediction_type: str, v_posterior: float) -> dict[str, Tensor]:
    """Every scalar that depends on the time step alone, float64 [T] each."""
    alphas, betas, previous = _alphas_betas_previous(alphas_cumprod)
    variance = posterior_variance(alphas_cumprod, v_posterior)
    return {
        "signal": alphas_cumprod.sqrt(),
        "deviation": (1 - alphas_cumprod).sqrt(),
        "noise_variance": 1 - alphas_cumprod,
        "log_noise_variance": torch.log1p(-alphas_cumprod),
        "posterior_of_x0": betas * previous.sqrt() / (1 - alphas_cumprod),
        "posterior_of_xt": (1 - previous) * alphas.sqrt() / (1 - alphas_cumprod),
        "posterior": variance,
        "log_posterior": variance.clamp(min=_SMALLEST_VARIANCE).log(),
        "vlb": vlb_weights(alphas_cumprod, prediction_type, v_posterior),
    }


def posterior_variance(alphas_cumprod: Tensor, v_posterior: float = 0.0) -> Tensor:
    """The variance (1−v)·β̃ + v·β of q(x_{t−1} | x_t, x₀).

    Args:
        alphas_cumprod: ᾱ, [T].
        v_posterior: v in [0, 1].

    Returns:
        [T], of the dtype of `alphas_cumprod`.
    """
    _, betas, previous = _alphas_betas_previous(alphas_cumprod)
    smallest = betas * (1 - previous) / (1 - alphas_cumprod)
    return (1 - v_posterior) * smallest + v_posterior * betas


def vlb_weights(alphas_cumprod: Tensor, prediction_type: str, v_posterior: float = 0.0) -> Tensor:
    """Weights of the squared errors in the variational bound, as CompVis computes them.

    With β_t and the posterior variance σ²_t = (1−v)·β̃_t + v·β_t::

        "epsilon"       β²/(2·σ²·α·(1−ᾱ))              (2006.11239, eq. 12)
        "sample"        ½·√ᾱ/(2 − ᾱ)                    as CompVis has it
        "v_prediction"  ᾱ_prev·β²/(2·σ²·(1−ᾱ))         eq. 12 with x₀ − x̂₀ = −√(1−ᾱ)·(v − v̂)

    The first step has no posterior variance; it is given the weight of the second. (Stability's
    code, where v comes from, has 1 for it at every step.)

    Args:
        alphas_cumprod: ᾱ, [T].

    Returns:
        [T], of the dtype of `alphas_cumprod`.
    """
    alphas, betas, previous = _alphas_betas_previous(alphas_cumprod)
    if prediction_type == "sample":
        weights = 0.5 * alphas_cumprod.sqrt() / (2 - alphas_cumprod)
    else:
        variance = posterior_variance(alphas_cumprod, v_posterior)
        weights = betas.square() / (2 * variance * (1 - alphas_cumprod))
        weights = weights / alphas if prediction_type == "epsilon" else weights * previous
    if len(weights) > 1:
        weights[0] = weights[1]
    return weights


def compute_dtype(value: Tensor) -> torch.dtype:
    """The precision of what is computed from a tensor: float64 of float64, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _alphas_betas_previous(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """α_t, β_t and ᾱ_{t−1}, [T] each; ᾱ before the first step is 1."""
    previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    alphas = alphas_cumprod / previous
    return alphas, 1 - alphas, previous
