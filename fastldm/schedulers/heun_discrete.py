"""Heun's method (Karras et al., "Elucidating the design space …", 2206.00364, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.schedulers.base import SchedulerOutput
from fastldm.schedulers.exploding import ExplodingScheduler
from fastldm.schedulers.noise_levels import Levels


class HeunDiscreteScheduler(ExplodingScheduler):
    """Heun's method, with diffusers' fields and defaults.

    A step but the last evaluates the model at both its ends, so `timesteps` has all but the first
    of its entries twice: a call of `step` goes to the next noise level by Euler's method, and the
    one after it goes there again, along the mean of the slopes at both ends.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: space the noise levels so, see
            `fastldm.schedulers.noise_levels.space_levels`; at most one of them.
        clip_sample, clip_sample_range: clip x₀ to ±`clip_sample_range`.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"`` (2305.08891, table 2).
        steps_offset: added to ``"leading"`` time steps.
        schedule_dtype: ``"float32"`` computes the scalars as diffusers does.

    Raises:
        ConfigError: a field has a value that is not accepted; the message names it.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        clip_sample: bool | None = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        schedule_dtype: str = "float32",
    ) -> None:
        self._set_schedule()
        self._set_limits()

    def _use_levels(
        self,
        timesteps: Levels,
        levels: Levels,
        final_level: float,
        device: str | torch.device | None,
    ) -> None:
        evaluations = np.repeat(np.arange(len(levels)), 2)[1:]
        super()._use_levels(timesteps[evaluations], levels[evaluations], final_level, device)

    def _forget(self) -> None:
        self._halfway: Tensor | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of a pair."""
        return self._halfway is None

    def _make_table(self, first_index: int, *options: float) -> Tensor:
        sigma, following = self.sigmas[:-1], self.sigmas[1:]
        is_first = (torch.arange(len(sigma)) - first_index) % 2 == 0
        change = (following - sigma).double()
        half_change_before = torch.cat((change[:1], change[:-1])) / 2
        others = (~is_first).double().unsqueeze(-1)
        noise = torch.where(is_first, sigma + change, half_change_before)
        return self._rows(sigma, sigma, is_first.double(), noise, others)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float = 0.0,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Go to the run's next noise level, or go there again.

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: the entry of `timesteps`; only the first step of a run looks at it.
            sample: x, [B, …]: not scaled as `scale_model_input` does.
            return_dict: give a `SchedulerOutput`; otherwise a tuple.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddim_step`.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, both with the dtype of `sample`.

        Raises:
            ConfigError: an argument is not accepted; the message names it.
        """
        index = self._advance(timestep)
        row = self._table(sample)[index]
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        output = self._linear_step(sample, model_output, row, (self._halfway,), guidance)
        if self.state_in_first_order:
            # Half of the whole step is made along the first slope.
            self._halfway = torch.lerp(sample.to(row.dtype), output.prev_sample.to(row.dtype), 0.5)
        else:
            self._halfway = None
        return SchedulerOutput(*output) if return_dict else (output[0], output[1])
