"""The singlestep DPM-Solver (Lu et al., "DPM-Solver++", 2211.01095, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.schedulers.base import SchedulerOutput, randn
from fastldm.schedulers.dpm_solver import DPMSolver, integrate
from fastldm.schedulers.noise_levels import Levels
from fastldm.schedulers.preserving import LogSnr


class DPMSolverSinglestepScheduler(DPMSolver):
    """DPM-Solver, singlestep, with diffusers' fields and defaults.

    The run falls into blocks of `solver_order` steps. Each step of a block starts from the block's
    first sample and has a higher order than the one before it.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        solver_order: 1, 2 or 3.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x₀
            (2205.11487).
        algorithm_type: ``"dpmsolver++"``, ``"sde-dpmsolver++"`` or ``"dpmsolver"``, see
            `fastldm.schedulers.dpm_solver`.
        solver_type: ``"midpoint"`` or ``"heun"``, of steps of second and third order.
        lower_order_final: end with lower orders; always so where the last step leads to σ = 0, and
            where the number of steps is not a multiple of `solver_order`.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: space the noise levels so, see
            `fastldm.schedulers.noise_levels.space_levels`; at most one of them.
        use_flow_sigmas, flow_shift, use_dynamic_shifting, time_shift_type: flow matching, which is
            refused.
        final_sigmas_type: the last step leads to ``"zero"`` or to ``"sigma_min"`` of the training.
        lambda_min_clipped: leave out time steps with a smaller λ.
        variance_type: of a model whose second half of the channels is a variance, which is not
            used: ``"learned"`` or ``"learned_range"``.
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
        lower_order_final: bool = False,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        schedule_dtype: str = "float32",
    ) -> None:
        self._set_schedule()
        self._set_limits()
        self._set_solver(("dpmsolver++", "sde-dpmsolver++", "dpmsolver"))

    def _forget(self) -> None:
        self.model_outputs: list[Tensor] = []
        self.sample: Tensor | None = None

    def _round_timesteps(self, timesteps: Levels) -> Levels:
        return timesteps.round() if self.level_spacing == "karras" else timesteps

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """The order of each step of a run from its beginning."""
        full, rest = divmod(num_inference_steps, self.solver_order)
        ends_at_zero = float(self.sigmas[-1]) == 0
        block = list(range(1, self.solver_order + 1))
        orders = block * full + block[:rest]
        if rest == 0 and (self.config.lower_order_final or ends_at_zero):
            # The last block is one of lower orders, as far as the number of steps allows.
            orders[-self.solver_order :] = [*block[:-1], 1]
        if ends_at_zero:
            orders[-1] = 1
        return orders

    def _order(self, index: int, first_index: int) -> int:
        """The order of a step of a run that begins at `first_index`."""
        return min(self.get_order_list(len(self.sigmas) - 1)[index], index - first_index + 1)

    def _make_table(self, first_index: int, *options: float) -> Tensor:
        snr = self._log_snr()
        index = torch.arange(len(self.sigmas) - 1)
        orders = torch.tensor([max(1, self._order(i, first_index)) for i in index.tolist()])
        update = torch.stack([self._updates(order, snr) for order in (1, 2, 3)])[orders - 1, index]
        of_start = torch.where(orders == 1, 0.0, update[:, 0])
        last = 1 + self.solver_order
        columns = [
            update[:, 0] - of_start,
            update[:, 1],
            of_start,
            *update[:, 2:last].unbind(dim=1),
        ]
        if self.is_stochastic:
            columns.append(update[:, -1])
        return self._rows(index, torch.stack(columns, dim=1), snr, of_noise=self.predicts_noise)

    def _updates(self, order: int, snr: LogSnr) -> Tensor:
        """All steps at one order, as factors of x, the predictions and noise, float64 [N, 5]."""
        index = torch.arange(len(self.sigmas) - 1)
        end, now, before, earlier = (snr.at(index + shift) for shift in (1, 0, -1, -2))
        x, m0, m1, m2, noise = torch.eye(5, dtype=torch.float64)
        midpoint = self.config.solver_type == "midpoint"
        if order == 1:
            return integrate(self.algorithm, now, end, x, [m0], noise)
        if order == 2:
            r0 = (now.lam - before.lam) / (end.lam - before.lam)
            slope = 1.0 / r0 * (m0 - m1)
            return integrate(self.algorithm, before, end, x, [m1, slope], noise, midpoint=midpoint)
        h = end.lam - earlier.lam
        r0, r1 = (now.lam - earlier.lam) / h, (before.lam - earlier.lam) / h
        near, far = 1.0 / r1 * (m1 - m2), 1.0 / r0 * (m0 - m2)
        differences = [m2, far]
        if not midpoint:
            slope, bend = (r0 * near - r1 * far) / (r0 - r1), 2.0 * (far - near) / (r0 - r1)
            differences = [m2, slope, bend]
        return integrate(self.algorithm, earlier, end, x, differences, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float = 0.0,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go to the run's next noise level.

        The order of a step decides what it does, so that `torch.compile` makes one graph a step:
        compile the model alone.

        Args:
            model_output: the model's prediction, shape of `sample`; with a learned variance
                [B, 2C, …].
            timestep: the entry of `timesteps`; only the first step of a run looks at it.
            sample: x_t, [B, C, …].
            generator: draws the noise of the SDE solver: one for the batch, or a list with one a
                sample.
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
        if self._order(index, self._first_index) == 1:
            self.sample, start = sample, None
        else:
            start = self.sample
        earlier = [*self.model_outputs, None, None][: self.solver_order - 1]
        others: list[Tensor | None] = [start, *earlier]
        if self.is_stochastic:
            others.append(randn(sample.shape, generator, sample.device, model_output.dtype))
        output = self._linear_step(sample, model_output, row, others, guidance)
        if self.solver_order > 1:
            prediction = output.pred_original_sample
            if self.predicts_noise:
                prediction = self._predicted_noise(sample, model_output, prediction, row, guidance)
            self.model_outputs = [prediction, *self.model_outputs][: self.solver_order - 1]
        return SchedulerOutput(output.prev_sample) if return_dict else (output.prev_sample,)
