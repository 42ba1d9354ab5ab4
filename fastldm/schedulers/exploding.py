"""What the samplers share whose samples are x = x₀ + σ·ε (the coordinates of 2206.00364)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastldm.schedulers.linear_step import ddim_rows, ddpm_rows
from fastldm.schedulers.noise_levels import Levels
from fastldm.schedulers.sigma_scheduler import SigmaScheduler
from fastldm.schedulers.timesteps import check_step_count, spaced_timesteps


class ExplodingScheduler(SigmaScheduler):
    """Base of the Euler, Heun and linear multistep samplers.

    The model was trained on x/√(σ²+1), which `scale_model_input` makes of a sample.
    """

    @property
    def init_noise_sigma(self) -> Tensor:
        """Standard deviation of the noise that sampling starts from, []."""
        largest = self.sigmas.max()
        if self.config.timestep_spacing in ("linspace", "trailing"):
            return largest
        return (largest**2 + 1) ** 0.5

    def _spaced_timesteps(self, num_inference_steps: int | None) -> Levels:
        total, spacing = self.num_train_timesteps, self.config.timestep_spacing
        steps = check_step_count(num_inference_steps, total)
        if spacing == "linspace":
            return np.linspace(0, total - 1, steps)[::-1]
        return spaced_timesteps(steps, total, spacing, self.config.steps_offset).numpy()

    def _cast_timesteps(self, timesteps: Levels) -> Levels:
        return timesteps.astype(np.float32 if self.schedule_dtype == torch.float32 else np.float64)

    def _level_range(self, levels: Levels, training: Levels) -> tuple[float, float]:
        config = self.config
        first, last = config.get("sigma_max"), config.get("sigma_min")
        return (
            float(levels[0]) if first is None else first,
            float(levels[-1]) if last is None else last,
        )

    def _rows(
        self,
        sigma: Tensor,
        noise_level: Tensor,
        original: Tensor,
        noise: Tensor,
        others: Tensor,
    ) -> Tensor:
        """The scalars of steps ``original·x₀ + noise·ε + Σ other·tensor`` for `linear_step`.

        Args:
            sigma: σ that the model's output is for, [N].
            noise_level: σ of the sample that ε = (x − x₀)/σ is taken from, [N].
            original, noise: factors, float64 [N].
            others: factors of further tensors, [N, M].
        """
        if self.prediction_type != "v_prediction":
            # No scalar here is rounded, for σ are float32 already.
            return ddim_rows(torch.ones_like(sigma), noise_level, original, noise, others)
        variance = sigma**2 + 1
        sqrt_alpha, sqrt_beta = 1 / variance.double(), sigma / variance**0.5
        of_sample = noise / noise_level
        return ddpm_rows(sqrt_alpha, sqrt_beta, original - of_sample, of_sample, others)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The model's input x/√(σ²+1); of a run's first step `timestep` must be given.

        Raises:
            ConfigError: the run does not visit `timestep`, or it has ended.
        """
        index = self._index(float("nan") if timestep is None else timestep)
        key = ("scales", sample.device, sample.dtype)
        if key not in self._tables:
            scales = (self.sigmas**2 + 1) ** 0.5
            self._tables[key] = scales.to(self._device_levels(sample))
        return sample / self._tables[key][index]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x₀ + σ·noise.

        Args:
            original_samples: x₀, [B, …].
            noise: standard normal, shape of `original_samples`.
            timesteps: of the run, [B] or []; without effect where `set_begin_index` has been
                called, where σ is that of the next step.

        Returns:
            x, [B, …]; half precisions are rounded once, at the end.

        Raises:
            ConfigError: the run does not visit a time step; on a device the sample is NaN instead.
        """
        noisy = original_samples + self._level_at(timesteps, original_samples) * noise
        return noisy.to(torch.promote_types(original_samples.dtype, noise.dtype))
