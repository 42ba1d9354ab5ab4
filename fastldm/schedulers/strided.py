"""What DDIM and PNDM share: a step leads one stride back, ⌊T/S⌋, and the last one to ᾱ's end."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.schedulers.diffusion import DiffusionScheduler
from fastldm.schedulers.timesteps import COMPVIS_SPACINGS


class StridedScheduler(DiffusionScheduler):
    """Base of DDIM and PNDM.

    Attributes:
        final_alpha_cumprod: ᾱ that the last step leads to, [].
    """

    def _set_final_alpha(self) -> None:
        first = self.alphas_cumprod[0]
        self.final_alpha_cumprod = (
            torch.ones_like(first) if self.config.set_alpha_to_one else first.clone()
        )

    @property
    def _goes_by_list(self) -> bool:
        """Whether a step leads to the next of the visited time steps, as in CompVis's samplers."""
        return self.config.timestep_spacing in COMPVIS_SPACINGS

    def previous_timestep(self, timestep: int) -> int:
        """``timestep − ⌊T/S⌋``, with CompVis's spacings the one visited next; negative for x₀.

        Raises:
            ConfigError: `set_timesteps` has not been called, or a CompVis run does not visit
                `timestep`.
        """
        if self._goes_by_list:
            return super().previous_timestep(timestep)
        return timestep - self._stride()

    def _stride(self) -> int:
        return self.num_train_timesteps // self._run_length()

    def _run_length(self) -> int:
        if self.num_inference_steps is None:
            raise ConfigError("num_inference_steps: not set; call set_timesteps before step")
        return self.num_inference_steps

    def _pairs(self) -> tuple[Tensor, Tensor]:
        if self._goes_by_list:
            self._run_length()
            return super()._pairs()
        every = torch.arange(self.num_train_timesteps, device=self.alphas_cumprod.device)
        return every, every - self._stride()
