"""What the solvers share whose samples are x = α·x₀ + σ_t·ε with α = √ᾱ and σ_t = √(1−ᾱ)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import DDIMCoefficient, predict_original_sample
from fastldm.schedulers.linear_step import ddim_rows, ddpm_rows
from fastldm.schedulers.noise_levels import Levels
from fastldm.schedulers.sigma_scheduler import SigmaScheduler
from fastldm.schedulers.timesteps import check_step_count

_FLOW_FIELDS = {"use_flow_sigmas": False, "use_dynamic_shifting": False, "shift_terminal": None}


class LogSnr(NamedTuple):
    """α, σ_t and λ = log(α/σ_t) of noise levels (2206.00927, section 2.2), [N] each."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    def at(self, index: Tensor) -> LogSnr:
        """Those of the levels at `index`, [n, 1] each, to multiply vectors with."""
        return LogSnr(*(value[index.clamp(min=0)].unsqueeze(-1) for value in self))


class PreservingScheduler(SigmaScheduler):
    """Base of DPM-Solver and UniPC, which integrate in λ.

    A run of S steps spaces S + 1 time steps, of which the last is left out.
    """

    init_noise_sigma = 1.0

    def _set_schedule(self) -> None:
        for field, neutral in _FLOW_FIELDS.items():
            if self.config.get(field, neutral) != neutral:
                raise ConfigError(
                    f"{field}: got {self.config[field]!r}; accepted: {neutral!r}, for there is no "
                    "flow matching here"
                )
        super()._set_schedule()
        self.alpha_t, self.sigma_t, self.lambda_t = _log_snr(
            self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        )

    def _spaced_timesteps(self, num_inference_steps: int | None) -> Levels:
        total = self._num_visitable()
        steps = check_step_count(num_inference_steps, total)
        spacing = self.config.get("timestep_spacing", "linspace")
        if spacing == "trailing":
            ratio = self.num_train_timesteps / steps
            values = np.arange(total, 0, -ratio)[:steps].round() - 1
            return values[values >= 0]
        if spacing == "leading":
            if steps == total:
                raise ConfigError(
                    f"num_inference_steps: got {steps}; accepted: less than {total} with "
                    "timestep_spacing 'leading'"
                )
            offset = self.config.steps_offset
            ratio = total // (steps + 1)
            offset = min(offset, self.num_train_timesteps - 1 - steps * ratio)
            return np.arange(steps, 0, -1) * ratio + offset
        return np.linspace(0, total - 1, steps + 1).round()[:0:-1]

    def _num_visitable(self) -> int:
        """The number of training time steps, from the first on, that a run may visit."""
        lambda_min = self.config.get("lambda_min_clipped", -float("inf"))
        return self.num_train_timesteps - int((self.lambda_t < lambda_min).sum())

    def _cast_timesteps(self, timesteps: Levels) -> Levels:
        return timesteps.astype(np.int64)

    def _level_range(self, levels: Levels, training: Levels) -> tuple[float, float]:
        config = self.config
        first, last = config.get("sigma_max"), config.get("sigma_min")
        return (
            float(training[-1]) if first is None else first,
            float(training[0]) if last is None else last,
        )

    def _log_snr(self) -> LogSnr:
        """Those of the run's noise levels."""
        alpha = 1 / (self.sigmas**2 + 1) ** 0.5
        return _log_snr(alpha, self.sigmas * alpha)

    def _orders_shown(self, orders: Tensor, snr: LogSnr) -> Tensor:
        """Orders of steps, [N], lowered to what the predictions before them can show.

        Where time steps are rounded to the same, a step leads from a level to itself.
        """
        still = snr.lam.diff() == 0
        for age in range(int(orders.max())):
            earlier = still.roll(age)
            earlier[:age] = False
            orders = torch.where(earlier, orders.clamp(max=max(1, age)), orders)
        return orders

    def _rows(
        self, index: Tensor, update: Tensor, snr: LogSnr, *, of_noise: bool = False
    ) -> Tensor:
        """The scalars of steps for `linear_step`.

        Args:
            index: positions of the noise levels that the model's outputs are for, [n].
            update: factors of the sample, the prediction and further tensors, float64 [n, 2 + M].
            snr: of the run's noise levels.
            of_noise: the prediction is ε, not x₀.
        """
        alpha, sigma = snr.alpha[index].double(), snr.sigma[index].double()
        sample, prediction, others = update[:, 0], update[:, 1], update[:, 2:]
        if not of_noise:
            return ddpm_rows(alpha, sigma, prediction, sample, others)
        kept = sample / self._norm(alpha, sigma)
        return ddim_rows(alpha, sigma, kept * alpha, kept * sigma + prediction, others)

    def _predicted_noise(
        self, sample: Tensor, model_output: Tensor, original: Tensor, row: Tensor, guidance: Any
    ) -> Tensor:
        """ε of a step whose (limited) x₀ is `original`, in the precision of the computation."""
        guided = guidance["model_output_uncond"] is not None
        if not self.thresholding:
            if self.prediction_type == "epsilon" and not guided:
                return model_output
            # Not rounded to the sample's dtype, for it is divided by σ_t.
            original = predict_original_sample(
                sample, model_output, row, prediction_type=self.prediction_type, **guidance
            )
        alpha, sigma = row[DDIMCoefficient.SQRT_ALPHA], row[DDIMCoefficient.SQRT_BETA]
        scaled = sample.to(row.dtype) * self._norm(alpha, sigma)
        return (scaled - alpha * original.to(row.dtype)) / sigma

    def _norm(self, alpha: Tensor, sigma: Tensor) -> Tensor | float:
        """The factor in norm·x = α·x₀ + σ_t·ε for the x₀ and ε that a step predicts.

        It is 1 but for the rounding of α and σ_t, from which both follow where v is predicted.
        """
        exact = self.prediction_type != "v_prediction" or self.thresholding
        return 1.0 if exact else alpha**2 + sigma**2

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α·x₀ + σ_t·noise (2006.11239, eq. 4).

        Args:
            original_samples: x₀, [B, …].
            noise: standard normal, shape of `original_samples`.
            timesteps: of the run, [B] or []; without effect where `set_begin_index` has been
                called, where the noise level is that of the next step.

        Returns:
            x_t, [B, …]; half precisions are rounded once, at the end.

        Raises:
            ConfigError: the run does not visit a time step; on a device the sample is NaN instead.
        """
        level = self._level_at(timesteps, original_samples)
        alpha = 1 / (level**2 + 1) ** 0.5
        noisy = alpha * original_samples + level * alpha * noise
        return noisy.to(torch.promote_types(original_samples.dtype, noise.dtype))


def _log_snr(alpha: Tensor, sigma: Tensor) -> LogSnr:
    return LogSnr(alpha, sigma, alpha.log() - sigma.log())
