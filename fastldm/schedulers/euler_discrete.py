"""Euler's method (Karras et al., "Elucidating the design space …", 2206.00364, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.schedulers.base import SchedulerOutput, randn
from fastldm.schedulers.checks import check_choice
from fastldm.schedulers.exploding import ExplodingScheduler
from fastldm.schedulers.noise_levels import Levels

_LARGEST_CHURN = 2**0.5 - 1


class EulerDiscreteScheduler(ExplodingScheduler):
    """Euler's method, with diffusers' fields and defaults.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        interpolation_type: ``"linear"`` takes the noise levels of the time steps,
            ``"log_linear"`` levels even in log σ over the whole schedule.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: space the noise levels so, see
            `fastldm.schedulers.noise_levels.space_levels`; at most one of them.
        sigma_min, sigma_max: ends of that spacing; by default those of the run.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"`` (2305.08891, table 2).
        timestep_type: ``"continuous"`` gives a model of v ``log σ/4`` in place of the time step.
        steps_offset: added to ``"leading"`` time steps.
        rescale_betas_zero_snr: zero-terminal SNR (2305.08891, algorithm 1), with ᾱ_T = 2⁻²⁴.
        final_sigmas_type: the last step leads to ``"zero"`` or to ``"sigma_min"`` of the training.
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
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        schedule_dtype: str = "float32",
    ) -> None:
        check_choice("interpolation_type", interpolation_type, ("linear", "log_linear"))
        check_choice("timestep_type", timestep_type, ("discrete", "continuous"))
        self._set_schedule()
        self._set_limits()

    _table_options = ((0.0, 0.0, float("inf")),)

    def _use_levels(
        self,
        timesteps: Levels,
        levels: Levels,
        final_level: float,
        device: str | torch.device | None,
    ) -> None:
        super()._use_levels(timesteps, levels, final_level, device)
        if self.config.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            self.timesteps = (0.25 * self.sigmas[:-1].log()).to(device)

    def _levels_of(self, visited: Levels, training: Levels) -> Levels:
        if self.config.interpolation_type == "linear":
            return super()._levels_of(visited, training)
        # One level more than time steps, as in diffusers: the run ends at the smallest.
        first, last = float(np.log(training[-1])), float(np.log(training[0]))
        return (
            torch.linspace(first, last, len(visited) + 1, dtype=self.schedule_dtype).exp().numpy()
        )

    def _make_table(self, first_index: int, *options: float) -> Tensor:
        sigma, following = self.sigmas[:-1], self.sigmas[1:]
        raised = sigma * (1 + self._churn(*options))
        noise = raised.double() + (following - raised).double()
        added = ((raised**2 - sigma**2) ** 0.5).unsqueeze(-1)
        rows = self._rows(sigma, raised, torch.ones_like(noise), noise, added[:, :0])
        return torch.cat((rows, added), dim=1)

    def _churn(self, s_churn: float, s_tmin: float, s_tmax: float) -> Tensor:
        """By how much each step raises its noise level, as a share of it (γ), [N]."""
        share = min(s_churn / (len(self.sigmas) - 1), _LARGEST_CHURN)
        sigma = self.sigmas[:-1]
        return torch.where((sigma >= s_tmin) & (sigma <= s_tmax), share, 0.0).to(sigma)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float = 0.0,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Go to the run's next noise level.

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: the entry of `timesteps`; only the first step of a run looks at it.
            sample: x, [B, …]: not scaled as `scale_model_input` does.
            s_churn, s_tmin, s_tmax, s_noise: the noise of 2206.00364, algorithm 2.
            generator: draws that noise: one for the batch, or a list with one a sample.
            return_dict: give a `SchedulerOutput`; otherwise a tuple.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddpm_step`.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, both with the dtype of `sample`.

        Raises:
            ConfigError: an argument is not accepted; the message names it.
        """
        churn = (float(s_churn), float(s_tmin), float(s_tmax))
        index = self._advance(timestep)
        row = self._table(sample, *churn)[index]
        start = sample
        if s_churn > 0 and bool(self._churn(*churn)[index] > 0):
            noise = randn(model_output.shape, generator, sample.device, model_output.dtype)
            start = sample.to(row.dtype) + row[-1] * (s_noise * noise.to(row.dtype))
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        output = self._linear_step(start, model_output, row[:-1], (), guidance)
        previous, original = (result.to(sample.dtype) for result in output)
        return SchedulerOutput(previous, original) if return_dict else (previous, original)
