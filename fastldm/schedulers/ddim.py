"""DDIM sampling (Song et al., "Denoising diffusion implicit models", 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.ops import ddim_coefficients, ddim_step
from fastldm.outputs import BaseOutput
from fastldm.schedulers.diffusion import noise_arguments
from fastldm.schedulers.strided import StridedScheduler


@dataclass
class DDIMSchedulerOutput(BaseOutput):
    """What `DDIMScheduler.step` gives."""

    prev_sample: Tensor
    """The sample at the previous time step: the next input of the model."""
    pred_original_sample: Tensor | None = None
    """x₀ as predicted at this step, after clipping or thresholding."""


class DDIMScheduler(StridedScheduler):
    """DDIM, with diffusers' fields and defaults.

    CompVis's sampler is ``beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
    set_alpha_to_one=False, timestep_spacing="uniform", schedule_dtype="float64"``.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        clip_sample, clip_sample_range: clip x₀ to ±`clip_sample_range`.
        set_alpha_to_one: the last step leads to ᾱ = 1 (x₀); otherwise to ᾱ of the first training
            time step.
        steps_offset: added to the time steps, see `fastldm.schedulers.spaced_timesteps`.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x₀
            (2205.11487) in place of clipping.
        timestep_spacing: as in `fastldm.schedulers.spaced_timesteps`.
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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        schedule_dtype: str = "float32",
    ) -> None:
        self._set_schedule()
        self._set_limits()
        self._set_final_alpha()

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Choose the time steps of a sampling run.

        Args:
            num_inference_steps: S, from 1 to T.
            device: where `timesteps` is put; the CPU by default.

        Raises:
            ConfigError: `num_inference_steps` is not an integer from 1 to T.
        """
        timesteps = self._spaced_timesteps(num_inference_steps)
        self.num_inference_steps = len(timesteps)
        self.timesteps = timesteps.to(device)

    def _make_table(self, eta: float) -> Tensor:
        visited, previous = self._pairs()
        alphas_prev = self._alphas_of(previous, self.final_alpha_cumprod)
        rows = ddim_coefficients(self.alphas_cumprod[visited], alphas_prev, eta)
        return self._tabulate(visited, rows)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float = 0.0,
        seed: int | Tensor | None = None,
        return_original: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go from x_t to the previous time step of the run (2010.02502, eq. 12).

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: t in [0, T): an int, or an integer tensor [] or [B]. A tensor on a device is
                not read back, so there an invalid time step is not reported.
            sample: x_t, [B, …].
            eta: η in [0, 1] of eq. 16; noise is added where it is positive.
            use_clipped_model_output: take ε anew from the clipped x₀, as GLIDE does.
            generator: draws the noise: one for the batch, or a list with one a sample.
            variance_noise: the noise itself, shape of `sample`.
            return_dict: give a `DDIMSchedulerOutput`; otherwise a tuple.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddim_step`.
            seed: draw the noise inside the step from this seed (int, or int64 [B] with one a
                sample) and the time step.
            return_original: give ``pred_original_sample``; without it a step writes half as much.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, both with the dtype of `sample`; the
            latter is empty, [0], where it is not wanted.

        Raises:
            ConfigError: `set_timesteps` has not been called, or an argument is not accepted; the
                message names it.
        """
        coefficients = self._coefficients(timestep, sample, eta)
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        noise = {}
        if eta > 0:
            noise = noise_arguments(timestep, model_output, generator, variance_noise, seed)
        output = ddim_step(
            sample,
            model_output,
            coefficients,
            prediction_type=self.prediction_type,
            use_clipped_model_output=use_clipped_model_output,
            **self._limits(sample, model_output, coefficients, guidance),
            **guidance,
            **noise,
            return_original=return_original,
        )
        if not return_dict:
            return output.prev_sample, output.pred_original_sample
        return DDIMSchedulerOutput(*output)
