"""The second stage's loss: what the UNet is to predict, and how far off it is.

ᾱ_t is ``alphas_cumprod`` of the noise schedule and x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε (2006.11239, eq. 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import ConfigError
from fastldm.losses.gaussian_diffusion import GaussianDiffusion, compute_dtype

LossType = Literal["l2", "l1", "huber"]


@dataclass
class DiffusionLossConfig:
    """What the diffusion loss is made of; the defaults are L_simple of the paper (eq. 2).

    Attributes:
        loss_type: ``"l2"`` (squared error), ``"l1"`` or ``"huber"``, a mean over each sample.
        huber_delta: the error at which the Huber loss goes from squared to absolute.
        l_simple_weight: weight of the simple loss.
        original_elbo_weight: weight of the variational bound's terms (2006.11239, eq. 12).
        v_posterior: the posterior variance in those terms is (1−v)·β̃ + v·β.
        learn_logvar: train a logarithm s_t of a variance for each time step; the simple loss is
            then L_t·exp(−s_t) + s_t.
        logvar_init: s_t at the start, and for good where it is not trained.
        snr_gamma: γ of min-SNR weighting (2303.09556), usually 5; None weighs all steps alike.

    Raises:
        ConfigError: a value is not among those accepted.
    """

    loss_type: LossType = "l2"
    huber_delta: float = 1.0
    l_simple_weight: float = 1.0
    original_elbo_weight: float = 0.0
    v_posterior: float = 0.0
    learn_logvar: bool = False
    logvar_init: float = 0.0
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(LossType):
            raise ConfigError(
                f"loss_type: expected one of {', '.join(get_args(LossType))}, "
                f"got {self.loss_type!r}"
            )
        for name, low, high in (
            ("huber_delta", 0.0, math.inf),
            ("l_simple_weight", 0.0, math.inf),
            ("original_elbo_weight", 0.0, math.inf),
            ("v_posterior", 0.0, 1.0),
            ("logvar_init", -math.inf, math.inf),
            ("snr_gamma", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is None and name == "snr_gamma":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not low <= value <= high:
                raise ConfigError(
                    f"{name}: expected a finite number in [{low}, {high}], got {value!r}"
                )
        for name in ("huber_delta", "snr_gamma"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name}: expected a number above 0, got 0")


class DiffusionLoss(nn.Module):
    """Targets and loss for one noise schedule and prediction type.

    Computed in float32 under autocast and for half-precision inputs, in float64 for float64 ones.

    Args:
        config: the terms and their weights.
        alphas_cumprod: ᾱ, [T].
        prediction_type: ``"epsilon"``, ``"sample"`` (x₀) or ``"v_prediction"`` (2202.00512).

    Attributes:
        logvar: s_t, [T], a parameter; None where it is not learned.
        process: the `GaussianDiffusion` of the schedule.

    Raises:
        ConfigError: the prediction type is unknown, or the schedule has no finite bound.
    """

    def __init__(
        self, config: DiffusionLossConfig, alphas_cumprod: Tensor, prediction_type: str = "epsilon"
    ) -> None:
        super().__init__()
        self.config = config
        self.prediction_type = prediction_type
        self.process = GaussianDiffusion(alphas_cumprod, prediction_type, config.v_posterior)
        self._snr_weights: Tensor | None = None
        if config.snr_gamma is not None:
            alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
            self._snr_weights = min_snr_weights(alphas_cumprod, prediction_type, config.snr_gamma)
        if config.original_elbo_weight and not self.process.vlb_weights.isfinite().all():
            raise ConfigError(
                "original_elbo_weight: the bound is infinite, because alphas_cumprod reaches 0 and "
                f"prediction_type is {prediction_type!r}; set it to 0 or predict v"
            )
        self.logvar: nn.Parameter | None = None
        if config.learn_logvar:
            start = float(config.logvar_init)
            self.logvar = nn.Parameter(torch.full((self.num_timesteps,), start))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.process.num_timesteps

    def diffuse(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model sees: x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε, whatever sampler is used later.

        Args:
            x0, noise: [B, …].
            timesteps: int64 [B].

        Returns:
            [B, …], in the dtype of `x0`.
        """
        return self.process.q_sample(x0, timesteps, noise)

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is to predict from x_t.

        Args:
            x0, noise: [B, …].
            timesteps: int64 [B].

        Returns:
            ε, x₀, or v = √ᾱ·ε − √(1−ᾱ)·x₀, [B, …].
        """
        return self.process.target(x0, noise, timesteps)

    def forward(
        self, model_output: Tensor, target: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a mean over the batch.

        Args:
            model_output, target: [B, …].
            timesteps: int64 [B].

        Returns:
            The total, and detached scalars to log: ``loss``, ``loss_simple``, ``loss_vlb``, and
            ``loss_gamma`` and ``logvar`` where the latter is learned.
        """
        dtype = compute_dtype(model_output)
        with torch.autocast(model_output.device.type, enabled=False):
            per_sample = self._error(model_output.to(dtype), target.to(dtype))
            loss_simple = per_sample.mean()
            loss_vlb = (self.process.vlb_weights_at(timesteps, per_sample) * per_sample).mean()
            weighted = per_sample
            if self._snr_weights is not None:
                self._snr_weights = self._snr_weights.to(per_sample.device)
                weighted = self._snr_weights[timesteps].to(dtype) * per_sample
            loss_gamma = self._by_logvar(weighted, timesteps).mean()
            total = self.config.l_simple_weight * loss_gamma
            if self.config.original_elbo_weight:
                total = total + self.config.original_elbo_weight * loss_vlb
        logs = {"loss": total, "loss_simple": loss_simple, "loss_vlb": loss_vlb}
        if self.logvar is not None:
            logs |= {"loss_gamma": loss_gamma, "logvar": self.logvar.mean()}
        return total, {name: value.detach() for name, value in logs.items()}

    def _error(self, output: Tensor, target: Tensor) -> Tensor:
        """[B, …] → the mean error of each sample, [B]."""
        if self.config.loss_type == "l1":
            error = F.l1_loss(output, target, reduction="none")
        elif self.config.loss_type == "l2":
            error = F.mse_loss(output, target, reduction="none")
        else:
            delta = self.config.huber_delta
            error = F.huber_loss(output, target, reduction="none", delta=delta)
        return error.flatten(1).mean(dim=1)

    def _by_logvar(self, error: Tensor, timesteps: Tensor) -> Tensor:
        """L_t·exp(−s_t) + s_t, [B]."""
        if self.logvar is None:
            constant = float(self.config.logvar_init)
            return error * math.exp(-constant) + constant
        logvar = self.logvar.to(error.dtype)[timesteps.to(self.logvar.device)]
        return error * torch.exp(-logvar) + logvar


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR-γ weights (Hang et al., 2303.09556, section 3.4), with SNR = ᾱ/(1−ᾱ).

    They weigh the error of x₀ by min(SNR, γ), whatever is predicted.

    Args:
        alphas_cumprod: ᾱ, [T].
        gamma: γ.

    Returns:
        [T]: min(SNR, γ) for ``"sample"``, that over SNR for ``"epsilon"`` and over SNR + 1 for
        ``"v_prediction"``.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return snr.clamp(max=gamma) / (snr + 1)
