"""The multistep DPM-Solver (Lu et al., "DPM-Solver++", 2211.01095, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.schedulers.base import SchedulerOutput, randn
from fastldm.schedulers.dpm_solver import DPMSolver, integrate
from fastldm.schedulers.noise_levels import Levels
from fastldm.schedulers.preserving import LogSnr

_FEW_STEPS = 15
"""Runs of fewer steps end with steps of lower orders, for stability."""


class DPMSolverMultistepScheduler(DPMSolver):
    """DPM-Solver, multistep, with diffusers' fields and defaults.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        solver_order: 1, 2 or 3: predictions that a step is made of.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x₀
            (2205.11487).
        algorithm_type: ``"dpmsolver++"``, ``"sde-dpmsolver++"``, ``"dpmsolver"`` or
            ``"sde-dpmsolver"``, see `fastldm.schedulers.dpm_solver`.
        solver_type: ``"midpoint"`` or ``"heun"``, of steps of second order.
        lower_order_final: end with lower orders where there are fewer than 15 steps.
        euler_at_final: make the last step one of first order.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas: space the noise
            levels so, see `fastldm.schedulers.noise_levels.space_levels`; at most one of them.
        use_flow_sigmas, flow_shift, use_dynamic_shifting, time_shift_type: flow matching, which is
            refused.
        final_sigmas_type: the last step leads to ``"zero"`` or to ``"sigma_min"`` of the training.
        lambda_min_clipped: leave out time steps with a smaller λ.
        variance_type: of a model whose second half of the channels is a variance, which is not
            used: ``"learned"`` or ``"learned_range"``.
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
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_lu_lambdas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        schedule_dtype: str = "float32",
    ) -> None:
        self._set_schedule()
        self._set_limits()
        self._set_solver(("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"))
        if algorithm_type == "sde-dpmsolver" and solver_order == 3:
            raise ConfigError("solver_order: got 3; accepted with 'sde-dpmsolver': 1, 2")

    def _forget(self) -> None:
        self.model_outputs: list[Tensor] = []

    def _round_timesteps(self, timesteps: Levels) -> Levels:
        rounds = self.level_spacing in ("karras", "lu")
        if rounds and self.config.beta_schedule != "squaredcos_cap_v2":
            return timesteps.round()
        return timesteps

    def _orders(self, first_index: int, snr: LogSnr) -> Tensor:
        """The order of each step, [N]."""
        config, steps = self.config, len(self.sigmas) - 1
        index = torch.arange(steps)
        orders = (index - first_index + 1).clamp(1, self.solver_order)
        if config.lower_order_final and steps < _FEW_STEPS:
            orders[-2:] = orders[-2:].clamp(max=2)
        ends_low = config.lower_order_final and steps < _FEW_STEPS
        if config.euler_at_final or ends_low or float(self.sigmas[-1]) == 0:
            orders[-1] = 1
        return self._orders_shown(orders, snr)

    def _make_table(self, first_index: int, *options: float) -> Tensor:
        snr = self._log_snr()
        orders = self._orders(first_index, snr)
        updates = torch.stack([self._updates(order, snr) for order in range(1, 4)])
        index = torch.arange(len(orders))
        update = updates[orders - 1, index]
        kept = [0, 1, *range(2, self.solver_order + 1)]
        if self.is_stochastic:
            kept.append(updates.shape[-1] - 1)
        return self._rows(index, update[:, kept], snr, of_noise=self.predicts_noise)

    def _updates(self, order: int, snr: LogSnr) -> Tensor:
        """All steps at one order, as factors of x, the predictions and noise, float64 [N, 5]."""
        index = torch.arange(len(self.sigmas) - 1)
        end, now, before, earlier = (snr.at(index + shift) for shift in (1, 0, -1, -2))
        x, m0, m1, m2, noise = torch.eye(5, dtype=torch.float64)
        h, h_0, h_1 = end.lam - now.lam, now.lam - before.lam, before.lam - earlier.lam
        r0, r1 = h_0 / h, h_1 / h
        slope, slope_before = 1.0 / r0 * (m0 - m1), 1.0 / r1 * (m1 - m2)
        differences = [m0]
        if order == 2:
            differences = [m0, slope]
        elif order == 3:
            bend = slope - slope_before
            differences = [m0, slope + r0 / (r0 + r1) * bend, 1.0 / (r0 + r1) * bend]
        midpoint = order == 2 and self.config.solver_type == "midpoint"
        return integrate(self.algorithm, now, end, x, differences, noise, midpoint=midpoint)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float = 0.0,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go to the run's next noise level.

        Args:
            model_output: the model's prediction, shape of `sample`; with a learned variance
                [B, 2C, …].
            timestep: the entry of `timesteps`; only the first step of a run looks at it.
            sample: x_t, [B, C, …].
            generator: draws the noise of an SDE solver, in float32: one for the batch, or a list
                with one a sample.
            variance_noise: the noise itself, shape of `sample`.
            return_dict: give a `SchedulerOutput`; otherwise a tuple.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddpm_step`.

        Returns:
            ``prev_sample`` with the dtype of `sample`.

        Raises:
            ConfigError: an argument is not accepted; the message names it.
        """
        index = self._advance(timestep)
        row = self._table(sample)[index]
        model_output, _ = self._split_variance(model_output, sample)
        if model_output_uncond is not None:
            model_output_uncond, _ = self._split_variance(model_output_uncond, sample)
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        others: list[Tensor | None] = [*self.model_outputs, None, None][: self.solver_order - 1]
        if self.is_stochastic:
            if variance_noise is None:
                variance_noise = randn(sample.shape, generator, sample.device, torch.float32)
            others.append(variance_noise)
        output = self._linear_step(sample, model_output, row, others, guidance)
        if self.solver_order > 1:
            prediction = output.pred_original_sample
            if self.predicts_noise:
                prediction = self._predicted_noise(sample, model_output, prediction, row, guidance)
            self.model_outputs = [prediction, *self.model_outputs][: self.solver_order - 1]
        return SchedulerOutput(output.prev_sample) if return_dict else (output.prev_sample,)
