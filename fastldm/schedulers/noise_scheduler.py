"""What every scheduler knows: the noise schedule of the training, and how x₀ is limited."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import (
    LEARNED_VARIANCE_TYPES,
    PREDICTION_TYPES,
    dynamic_threshold,
    predict_original_sample,
)
from fastldm.schedulers.base import SchedulerMixin
from fastldm.schedulers.betas import make_betas, rescale_zero_terminal_snr
from fastldm.schedulers.checks import HUGE, TINY, check_choice, check_integer, check_number

_SCHEDULE_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class NoiseScheduler(SchedulerMixin):
    """Base of all schedulers; the constructors call `_set_schedule` and `_set_limits`.

    Attributes:
        betas, alphas, alphas_cumprod: [T] in `schedule_dtype`.
        num_train_timesteps: T.
        num_inference_steps: None before `set_timesteps`.
    """

    prediction_types: ClassVar[tuple[str, ...]] = PREDICTION_TYPES
    alphas_cumprod: Tensor
    timesteps: Tensor
    _tables: dict[Any, Tensor]
    """What is kept on the device of the samples until the time steps change."""

    def _set_schedule(self) -> None:
        """Take over the config's noise schedule, and check it."""
        config = self.config
        check_integer("num_train_timesteps", config.num_train_timesteps, minimum=1)
        check_choice("prediction_type", config.prediction_type, self.prediction_types)
        check_choice("schedule_dtype", config.schedule_dtype, tuple(_SCHEDULE_DTYPES))
        if "timestep_spacing" in config:
            check_choice("timestep_spacing", config.timestep_spacing, self.timestep_spacings)
            check_integer("steps_offset", config.steps_offset, minimum=0)
        self.num_train_timesteps: int = config.num_train_timesteps
        self.prediction_type: str = config.prediction_type
        self.schedule_dtype = _SCHEDULE_DTYPES[config.schedule_dtype]
        betas = make_betas(
            config.beta_schedule,
            config.beta_start,
            config.beta_end,
            config.num_train_timesteps,
            config.trained_betas,
            dtype=self.schedule_dtype,
        )
        if config.trained_betas is not None:
            self.register_config(trained_betas=[float(beta) for beta in config.trained_betas])
        rescaled = config.get("rescale_betas_zero_snr", False)
        self.betas = rescale_zero_terminal_snr(betas) if rescaled else betas
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(dim=0)
        self.num_inference_steps: int | None = None

    def _set_limits(self) -> None:
        """Take over the config's limits of x₀, those that the class has, and check them."""
        config = self.config
        for name in ("clip_sample_range", "sample_max_value"):
            if name in config:
                check_number(name, config[name], TINY, HUGE)
        if "dynamic_thresholding_ratio" in config:
            check_number("dynamic_thresholding_ratio", config.dynamic_thresholding_ratio, 0, 1)
        clips = config.get("clip_sample", False)
        self.clip_range = float(config.clip_sample_range) if clips else None
        self.thresholding = bool(config.get("thresholding", False))
        self.dynamic_thresholding_ratio = float(config.get("dynamic_thresholding_ratio", 1))
        self.sample_max_value = float(config.get("sample_max_value", 1))

    def __len__(self) -> int:
        return self.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The model's input at a time step: `sample` itself, unless a scheduler says otherwise."""
        return sample

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v prediction, v = √ᾱ_t·noise − √(1−ᾱ_t)·x₀ (2202.00512, appendix D).

        Args:
            sample: x₀, [B, …].
            noise: standard normal, shape of `sample`.
            timesteps: training time steps in [0, T), [B] or []. (diffusers' Euler scheduler takes
                ᾱ at their positions in its own descending list instead, so of T − 1 − t.)

        Returns:
            v, [B, …]; half precisions are rounded once, at the end.
        """
        signal, deviation = self._forward_scalars(timesteps, sample)
        velocity = signal * noise - deviation * sample
        return velocity.to(torch.promote_types(sample.dtype, noise.dtype))

    def _forward_scalars(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1−ᾱ_t), broadcastable against `like`, in float32 or float64."""
        dtype = compute_dtype(like)
        key = ("alphas_cumprod", like.device, dtype)
        if key not in self._tables:
            self._tables[key] = self.alphas_cumprod.to(like.device, dtype)
        alpha = self._tables[key][timesteps.to(like.device, torch.int64).flatten()]
        alpha = alpha.reshape(-1, *(1,) * (like.ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def _limits(
        self,
        sample: Tensor,
        model_output: Tensor,
        coefficients: Tensor,
        guidance: dict[str, Any],
    ) -> dict[str, Any]:
        """The arguments by which a step operator limits x₀ as the config says."""
        if not self.thresholding:
            return {"clip_range": self.clip_range}
        original = predict_original_sample(
            sample, model_output, coefficients, prediction_type=self.prediction_type, **guidance
        )
        threshold = dynamic_threshold(
            original, self.dynamic_thresholding_ratio, self.sample_max_value
        )
        return {"threshold": threshold}

    def _split_variance(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the channels of a model that predicts its variance too."""
        variance_type = self.config.get("variance_type")
        if variance_type not in LEARNED_VARIANCE_TYPES:
            return model_output, None
        channels = sample.shape[1]
        if model_output.shape[1] != 2 * channels:
            raise ConfigError(
                f"model_output: got {model_output.shape[1]} channels; accepted: {2 * channels}, "
                f"twice those of sample, with variance_type {variance_type!r}"
            )
        prediction, variance = model_output.split(channels, dim=1)
        return prediction, variance


def compute_dtype(sample: Tensor) -> torch.dtype:
    """The precision that a sample's steps are computed in."""
    return torch.float64 if sample.dtype == torch.float64 else torch.float32
