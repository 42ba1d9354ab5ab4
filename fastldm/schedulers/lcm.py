"""Multistep sampling of latent consistency models (Luo et al., 2310.04378, algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.ops import DDPMCoefficient, ddpm_step
from fastldm.outputs import BaseOutput
from fastldm.schedulers.checks import HUGE, check_integer, check_number
from fastldm.schedulers.diffusion import DiffusionScheduler, noise_arguments, stays_on_device
from fastldm.schedulers.linear_step import ddpm_rows
from fastldm.schedulers.timesteps import TIMESTEP_SPACINGS, check_step_count, custom_timesteps

_SIGMA_DATA = 0.5


@dataclass
class LCMSchedulerOutput(BaseOutput):
    """What `LCMScheduler.step` gives."""

    prev_sample: Tensor
    """The sample at the next time step of the run: the next input of the model."""
    denoised: Tensor | None = None
    """x₀ as the consistency model gives it."""


class LCMScheduler(DiffusionScheduler):
    """The sampler of latent consistency models, with diffusers' fields and defaults.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        original_inference_steps: time steps that the model was distilled on, evenly spaced.
        clip_sample, clip_sample_range: clip x₀ to ±`clip_sample_range`.
        set_alpha_to_one, steps_offset, timestep_spacing: without effect here; kept for other
            schedulers that take over the config.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x₀
            (2205.11487) in place of clipping.
        timestep_scaling: factor of the time step in the model's boundary condition.
        rescale_betas_zero_snr: zero-terminal SNR (2305.08891, algorithm 1).
        schedule_dtype: ``"float32"`` computes the scalars as diffusers does.

    Raises:
        ConfigError: a field has a value that is not accepted; the message names it.
    """

    timestep_spacings = TIMESTEP_SPACINGS

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        schedule_dtype: str = "float32",
    ) -> None:
        check_integer("original_inference_steps", original_inference_steps, minimum=1)
        check_number("timestep_scaling", timestep_scaling, 0, HUGE)
        self._set_schedule()
        self._set_limits()
        self.custom_timesteps = False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the time steps of a sampling run: S of those that the model was distilled on.

        Args:
            num_inference_steps: S.
            device: where `timesteps` is put; the CPU by default.
            original_inference_steps: in place of the config's.
            timesteps: the time steps themselves, strictly descending, in place of a number.
            strength: in (0, 1], for image-to-image sampling: the share of the distilled time steps,
                from the lowest on, that the run is chosen from; of given time steps the share
                that is left, at the end.

        Raises:
            ConfigError: both or neither of number and time steps are given, or an argument is not
                accepted.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ConfigError("num_inference_steps, timesteps: give exactly one of them")
        check_number("strength", strength, 0, 1)
        self.custom_timesteps = timesteps is not None
        if timesteps is not None:
            chosen = custom_timesteps(timesteps, self.num_train_timesteps)
            self.num_inference_steps = len(chosen)
            chosen = chosen[len(chosen) - int(len(chosen) * strength) :]
        else:
            original = original_inference_steps or self.config.original_inference_steps
            check_integer("original_inference_steps", original, minimum=1)
            if original > self.num_train_timesteps:
                raise ConfigError(
                    f"original_inference_steps: got {original}; accepted: at most "
                    f"{self.num_train_timesteps} (num_train_timesteps)"
                )
            distilled = np.arange(1, int(original * strength) + 1)
            distilled = (distilled * (self.num_train_timesteps // original) - 1)[::-1]
            steps = check_step_count(num_inference_steps, self.num_train_timesteps)
            if steps > len(distilled):
                raise ConfigError(
                    f"num_inference_steps: got {steps}; accepted: at most {len(distilled)}, "
                    "original_inference_steps × strength"
                )
            positions = np.linspace(0, len(distilled), steps, endpoint=False).astype(np.int64)
            chosen = torch.from_numpy(distilled[positions])
            self.num_inference_steps = steps
        self.timesteps = chosen.to(device)

    def _make_table(self, eta: float) -> Tensor:
        """Rows of `ddpm_step` that give the denoised sample, √ᾱ and √(1−ᾱ) of the next step."""
        visited, following = self._pairs()
        alpha = self.alphas_cumprod[visited]
        alpha_next = self._alphas_of(following, torch.ones(()))
        # The boundary condition makes the model the identity at the time step 0.
        scaled = visited.to(alpha) * self.config.timestep_scaling
        skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        out = scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5
        rows = ddpm_rows(
            alpha.sqrt(), (1 - alpha).sqrt(), out, skip, alpha.new_zeros(len(alpha), 0)
        )
        further = torch.stack((alpha_next.sqrt(), (1 - alpha_next).sqrt()), dim=1)
        return self._tabulate(visited, torch.cat((rows, further.double()), dim=1))

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
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """Denoise, and go to the next time step of the run.

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: t, one of `timesteps`: an int, or an integer tensor []. A tensor on a device
                is not read back: there a time step that is not visited gives NaN.
            sample: x_t, [B, …].
            generator: draws the noise, but for the last step: one for the batch, or a list with
                one a sample.
            return_dict: give an `LCMSchedulerOutput`; otherwise a tuple.
            variance_noise: the noise itself, shape of `sample`.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddpm_step`.

        Returns:
            ``prev_sample`` and ``denoised``, both with the dtype of `sample`.

        Raises:
            ConfigError: `set_timesteps` has not been called, or an argument is not accepted; the
                message names it.
        """
        if self.num_inference_steps is None:
            raise ConfigError("num_inference_steps: not set; call set_timesteps before step")
        coefficients = self._coefficients(timestep, sample)
        width = len(DDPMCoefficient)
        step_coefficients = coefficients[..., :width]
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        denoised = ddpm_step(
            sample,
            model_output,
            step_coefficients,
            prediction_type=self.prediction_type,
            **self._limits(sample, model_output, step_coefficients, guidance),
            **guidance,
        ).prev_sample
        previous = denoised
        if stays_on_device(timestep) or self.previous_timestep(int(timestep)) >= 0:
            drawn = noise_arguments(timestep, model_output, generator, variance_noise, None)
            signal, deviation = (
                factor.reshape(-1, *(1,) * (sample.ndim - 1))
                for factor in coefficients[..., width:].unbind(dim=-1)
            )
            previous = (signal * denoised + deviation * drawn["noise"]).to(sample.dtype)
        return LCMSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)
