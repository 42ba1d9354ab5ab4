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

LossType = Literal["l2", "l1", "huber"]
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


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
        logvar: s_t, [T]: a parameter if it is learned.

    Raises:
        ConfigError: the prediction type is unknown, or the schedule has no finite bound.
    """

    def __init__(
        self, config: DiffusionLossConfig, alphas_cumprod: Tensor, prediction_type: str = "epsilon"
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, "
                f"got {prediction_type!r}"
            )
        self.config = config
        self.prediction_type = prediction_type
        alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
        tables = {
            "alphas_cumprod": alphas_cumprod,
            "vlb": vlb_weights(alphas_cumprod, prediction_type, config.v_posterior),
        }
        if config.snr_gamma is not None:
            tables["snr"] = min_snr_weights(alphas_cumprod, prediction_type, config.snr_gamma)
        self._tables = tables
        self._cast_tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        if config.original_elbo_weight and not tables["vlb"].isfinite().all():
            raise ConfigError(
                "original_elbo_weight: the bound is infinite, because alphas_cumprod reaches 0 and "
                f"prediction_type is {prediction_type!r}; set it to 0 or predict v"
            )
        logvar = torch.full((len(alphas_cumprod),), config.logvar_init, dtype=torch.float32)
        self.logvar: Tensor
        if config.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self._tables["alphas_cumprod"])

    def diffuse(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model sees: x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε, whatever sampler is used later.

        Args:
            x0, noise: [B, …].
            timesteps: int64 [B].

        Returns:
            [B, …], in the dtype of `x0`.
        """
        dtype = _compute_dtype(x0)
        alpha = self._at("alphas_cumprod", timesteps, dtype)
        alpha = alpha.view(-1, *[1] * (x0.ndim - 1))
        return (alpha.sqrt() * x0.to(dtype) + (1 - alpha).sqrt() * noise.to(dtype)).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is to predict from x_t.

        Args:
            x0, noise: [B, …].
            timesteps: int64 [B].

        Returns:
            ε, x₀, or v = √ᾱ·ε − √(1−ᾱ)·x₀, [B, …].
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        dtype = _compute_dtype(x0)
        alpha = self._at("alphas_cumprod", timesteps, dtype)
        alpha = alpha.view(-1, *[1] * (x0.ndim - 1))
        return alpha.sqrt() * noise.to(dtype) - (1 - alpha).sqrt() * x0.to(dtype)

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
        dtype = _compute_dtype(model_output)
        with torch.autocast(model_output.device.type, enabled=False):
            per_sample = self._error(model_output.to(dtype), target.to(dtype))
            loss_simple = per_sample.mean()
            loss_vlb = (self._at("vlb", timesteps, dtype) * per_sample).mean()
            weighted = per_sample
            if self.config.snr_gamma is not None:
                weighted = self._at("snr", timesteps, dtype) * per_sample
            logvar = self.logvar.to(dtype)[timesteps.to(self.logvar.device)]
            loss_gamma = (weighted * torch.exp(-logvar) + logvar).mean()
            total = self.config.l_simple_weight * loss_gamma
            if self.config.original_elbo_weight:
                total = total + self.config.original_elbo_weight * loss_vlb
        logs = {"loss": total, "loss_simple": loss_simple, "loss_vlb": loss_vlb}
        if self.config.learn_logvar:
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

    def _at(self, name: str, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Entries of a table of [T] at `timesteps`, [B]."""
        key = (name, timesteps.device, dtype)
        if key not in self._cast_tables:
            self._cast_tables[key] = self._tables[name].to(timesteps.device, dtype)
        return self._cast_tables[key][timesteps]


def vlb_weights(alphas_cumprod: Tensor, prediction_type: str, v_posterior: float = 0.0) -> Tensor:
    """Weights of the squared errors in the variational bound, as CompVis computes them.

    With β_t and the posterior variance σ²_t = (1−v)·β̃_t + v·β_t::

        "epsilon"       β²/(2·σ²·α·(1−ᾱ))              (2006.11239, eq. 12)
        "sample"        ½·√ᾱ/(2 − ᾱ)                    as CompVis has it
        "v_prediction"  ᾱ_prev·β²/(2·σ²·(1−ᾱ))         eq. 12 with x₀ − x̂₀ = −√(1−ᾱ)·(v − v̂)

    The first step has no posterior variance; it is given the weight of the second.

    Args:
        alphas_cumprod: ᾱ, [T].

    Returns:
        [T], of the dtype of `alphas_cumprod`.
    """
    previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    alphas = alphas_cumprod / previous
    betas = 1 - alphas
    if prediction_type == "sample":
        weights = 0.5 * alphas_cumprod.sqrt() / (2 - alphas_cumprod)
    else:
        smallest = betas * (1 - previous) / (1 - alphas_cumprod)
        variance = (1 - v_posterior) * smallest + v_posterior * betas
        weights = betas.square() / (2 * variance * (1 - alphas_cumprod))
        weights = weights / alphas if prediction_type == "epsilon" else weights * previous
    if len(weights) > 1:
        weights[0] = weights[1]
    return weights


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


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32
