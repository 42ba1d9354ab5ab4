"""Ancestral sampling (Ho et al., "Denoising diffusion probabilistic models", 2006.11239)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.ops import VARIANCE_TYPES, ddpm_coefficients, ddpm_step
from fastldm.outputs import BaseOutput
from fastldm.schedulers.checks import check_choice
from fastldm.schedulers.diffusion import DiffusionScheduler, noise_arguments, stays_on_device
from fastldm.schedulers.timesteps import custom_timesteps


@dataclass
class DDPMSchedulerOutput(BaseOutput):
    """What `DDPMScheduler.step` gives."""

    prev_sample: Tensor
    """The sample at the previous time step: the next input of the model."""
    pred_original_sample: Tensor | None = None
    """x₀ as predicted at this step, after clipping or thresholding."""


class DDPMScheduler(DiffusionScheduler):
    """DDPM, with diffusers' fields and defaults.

    Before `set_timesteps` it walks the whole training schedule.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        variance_type: ``"fixed_small"`` (β̃), ``"fixed_large"`` (β), the same with the suffix
            ``"_log"``, ``"learned"`` (the model gives the variance in the second half of its
            channels) or ``"learned_range"`` (it gives the position between log β̃ and log β).
        clip_sample, clip_sample_range: clip x₀ to ±`clip_sample_range`.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x₀
            (2205.11487) in place of clipping.
        timestep_spacing: as in `fastldm.schedulers.spaced_timesteps`.
        steps_offset: added to the time steps, see `fastldm.schedulers.spaced_timesteps`.
        rescale_betas_zero_snr: zero-terminal SNR (2305.08891, algorithm 1).
        schedule_dtype: ``"float32"`` computes the schedule as diffusers does, ``"float64"`` as
            CompVis does.

    Raises:
        ConfigError: a field has a value that is not accepted; the message names it.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        schedule_dtype: str = "float32",
    ) -> None:
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        self._set_schedule()
        self._set_limits()
        self.variance_type = variance_type
        self.custom_timesteps = False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the time steps of a sampling run.

        Args:
            num_inference_steps: S, from 1 to T.
            device: where `timesteps` is put; the CPU by default.
            timesteps: the time steps themselves, strictly descending, in place of a number.

        Raises:
            ConfigError: both or neither of number and time steps are given, or they are not
                accepted.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ConfigError("num_inference_steps, timesteps: give exactly one of them")
        self.custom_timesteps = timesteps is not None
        if timesteps is not None:
            chosen = custom_timesteps(timesteps, self.num_train_timesteps)
        elif num_inference_steps is not None:
            chosen = self._spaced_timesteps(num_inference_steps)
            self.num_inference_steps = len(chosen)
        self.timesteps = chosen.to(device)

    def _make_table(self, eta: float) -> Tensor:
        visited, previous = self._pairs()
        rows = ddpm_coefficients(
            self.alphas_cumprod[visited],
            self._alphas_of(previous, torch.ones(())),
            self.variance_type,
            add_noise=visited > 0,
        )
        return self._tabulate(visited, rows)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float = 0.0,
        seed: int | Tensor | None = None,
        return_original: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go from x_t to the previous time step of the run (2006.11239, eq. 7).

        Args:
            model_output: the model's prediction, shape of `sample`; for the learned variances
                [B, 2C, …], whose second half is the variance.
            timestep: t, one of `timesteps`: an int, or an integer tensor [] or [B]. A tensor on a
                device is not read back: there a time step that is not visited gives NaN, and the
                generator is advanced at t = 0 too.
            sample: x_t, [B, C, …].
            generator: draws the noise: one for the batch, or a list with one a sample.
            return_dict: give a `DDPMSchedulerOutput`; otherwise a tuple.
            variance_noise: the noise itself, shape of `sample`.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddpm_step`; a learned variance is that of
                `model_output`.
            seed: draw the noise inside the step from this seed (int, or int64 [B] with one a
                sample) and the time step.
            return_original: give ``pred_original_sample``; without it a step writes half as much.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, both with the dtype of `sample`; the
            latter is empty, [0], where it is not wanted.

        Raises:
            ConfigError: an argument is not accepted; the message names it.
        """
        coefficients = self._coefficients(timestep, sample)
        model_output, predicted_variance = self._split_variance(model_output, sample)
        if model_output_uncond is not None:
            model_output_uncond, _ = self._split_variance(model_output_uncond, sample)
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        noise = {}
        if stays_on_device(timestep) or timestep > 0:
            noise = noise_arguments(timestep, model_output, generator, variance_noise, seed)
        output = ddpm_step(
            sample,
            model_output,
            coefficients,
            prediction_type=self.prediction_type,
            variance_type=self.variance_type,
            predicted_variance=predicted_variance,
            **self._limits(sample, model_output, coefficients, guidance),
            **guidance,
            **noise,
            return_original=return_original,
        )
        if not return_dict:
            return output.prev_sample, output.pred_original_sample
        return DDPMSchedulerOutput(*output)
