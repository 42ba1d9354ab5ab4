"""Ancestral sampling with Euler's method, as k-diffusion introduced it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.schedulers.base import SchedulerOutput, randn
from fastldm.schedulers.exploding import ExplodingScheduler


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """Euler's method to a lower noise level than the next, and noise up to the next.

    With diffusers' fields and defaults.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"`` (2305.08891, table 2).
        steps_offset: added to ``"leading"`` time steps.
        rescale_betas_zero_snr: zero-terminal SNR (2305.08891, algorithm 1), with ᾱ_T = 2⁻²⁴.
        schedule_dtype: ``"float32"`` computes the scalars as diffusers does.

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
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        schedule_dtype: str = "float32",
    ) -> None:
        self._set_schedule()
        self._set_limits()

    def _make_table(self, first_index: int, *options: float) -> Tensor:
        sigma, following = self.sigmas[:-1], self.sigmas[1:]
        # The variance of x at the next level given x₀ and x at this one (2006.11239, eq. 7). Levels
        # may rise next to a terminal SNR of zero; such a step adds no noise.
        added = (following**2 * (sigma**2 - following**2) / sigma**2).clamp(min=0) ** 0.5
        lowered = (following**2 - added**2).clamp(min=0) ** 0.5
        noise = sigma.double() + (lowered - sigma).double()
        return self._rows(sigma, sigma, torch.ones_like(noise), noise, added.unsqueeze(-1))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float = 0.0,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Go to the run's next noise level.

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: the entry of `timesteps`; only the first step of a run looks at it.
            sample: x, [B, …]: not scaled as `scale_model_input` does.
            generator: draws the noise: one for the batch, or a list with one a sample.
            return_dict: give a `SchedulerOutput`; otherwise a tuple.
            variance_noise: the noise itself, shape of `sample`.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddim_step`.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, both with the dtype of `sample`.

        Raises:
            ConfigError: an argument is not accepted; the message names it.
        """
        index = self._advance(timestep)
        noise = variance_noise
        if noise is None:
            noise = randn(model_output.shape, generator, sample.device, model_output.dtype)
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        row = self._table(sample)[index]
        output = self._linear_step(sample, model_output, row, (noise,), guidance)
        return SchedulerOutput(*output) if return_dict else (output[0], output[1])
