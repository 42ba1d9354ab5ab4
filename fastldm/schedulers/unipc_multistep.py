"""The unified predictor-corrector (Zhao et al., "UniPC", 2302.04867, algorithms 5 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.schedulers.base import SchedulerOutput
from fastldm.schedulers.checks import check_choice, check_integer
from fastldm.schedulers.linear_step import weighted_sum
from fastldm.schedulers.noise_levels import Levels
from fastldm.schedulers.preserving import LogSnr, PreservingScheduler

_SOLVER_TYPES = ("bh1", "bh2")
_FOREIGN_SOLVER_TYPES = ("midpoint", "heun", "logrho")
_LARGEST_ORDER = 8

# Kinds of tables.
_PREDICTION, _CORRECTION, _AFTER_CORRECTION = 0, 1, 2


class UniPCMultistepScheduler(PreservingScheduler):
    """UniPC, with diffusers' fields and defaults.

    A step first corrects the sample that the step before it predicted, with the model's output
    there, and then predicts the next one.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        solver_order: from 1 to 8: predictions that a step is made of.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x₀
            (2205.11487), where `predict_x0` is True.
        predict_x0: integrate x₀; otherwise ε.
        solver_type: ``"bh1"`` (B(h) = h) or ``"bh2"`` (B(h) = eʰ − 1).
        lower_order_final: end with steps of lower orders.
        disable_corrector: positions of steps after which no correction is made.
        solver_p: another scheduler as the predictor, which is refused.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: space the noise levels so, see
            `fastldm.schedulers.noise_levels.space_levels`; at most one of them.
        use_flow_sigmas, flow_shift, use_dynamic_shifting, time_shift_type, shift_terminal: flow
            matching, which is refused.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"`` (2305.08891, table 2).
        steps_offset: added to ``"leading"`` time steps.
        final_sigmas_type: the last step leads to ``"zero"`` or to ``"sigma_min"``: of the training,
            or of the spacing where there is one.
        rescale_betas_zero_snr: zero-terminal SNR (2305.08891, algorithm 1), with ᾱ_T = 2⁻²⁴.
        sigma_min, sigma_max: ends of the spacing; by default those of the training.
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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: Any = None,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str | None = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
        schedule_dtype: str = "float32",
    ) -> None:
        check_integer("solver_order", solver_order, minimum=1)
        if solver_order > _LARGEST_ORDER:
            raise ConfigError(
                f"solver_order: got {solver_order}; accepted: at most {_LARGEST_ORDER}"
            )
        if solver_p is not None:
            raise ConfigError(
                "solver_p: accepted: None; no other scheduler serves as the predictor"
            )
        if solver_type in _FOREIGN_SOLVER_TYPES:
            self.register_config(solver_type="bh2")
        check_choice("solver_type", self.config.solver_type, _SOLVER_TYPES)
        self._set_schedule()
        self._set_limits()
        if not predict_x0:
            self.thresholding = False
        self.predict_x0 = predict_x0
        self.solver_order = solver_order
        self.disable_corrector = list(disable_corrector)

    _table_options = ((_PREDICTION,), (_CORRECTION,), (_AFTER_CORRECTION,))

    def _forget(self) -> None:
        self.model_outputs: list[Tensor] = []
        self.last_sample: Tensor | None = None

    def _round_timesteps(self, timesteps: Levels) -> Levels:
        return timesteps.round() if self.level_spacing == "karras" else timesteps

    def _final_level(self, levels: Levels, training: Levels) -> float:
        if self.level_spacing is not None and self.config.final_sigmas_type == "sigma_min":
            return float(levels[-1])
        return super()._final_level(levels, training)

    def _orders(self, first_index: int, snr: LogSnr) -> Tensor:
        """The order of each step, [N]."""
        steps = len(self.sigmas) - 1
        index = torch.arange(steps)
        orders = (index - first_index + 1).clamp(1, self.solver_order)
        if self.config.lower_order_final:
            orders = torch.minimum(orders, steps - index)
        if float(self.sigmas[-1]) == 0:
            orders[-1] = 1
        return self._orders_shown(orders, snr)

    def _make_table(self, first_index: int, *options: float) -> Tensor:
        """The rows of one kind of update.

        Further tensors are the earlier predictions and, of a correction, before them the sample
        that the step before started from. After a correction there is no fused step: the factors
        are those of the sample, the prediction and the earlier predictions.
        """
        (kind,) = options
        snr = self._log_snr()
        orders, index = self._orders(first_index, snr), torch.arange(len(self.sigmas) - 1)
        if kind == _CORRECTION:
            orders, start = orders.roll(1), index - 1
        else:
            start = index
        update = torch.zeros(len(index), self.solver_order + 2, dtype=torch.float64)
        for order in orders.unique().tolist():
            steps = orders == order
            update[steps] = self._updates(start[steps], order, snr, kind == _CORRECTION)
        of_sample, of_outputs, of_output_after = update[:, :1], update[:, 1:-1], update[:, -1:]
        if kind == _AFTER_CORRECTION:
            return update[:, :-1]
        columns: tuple[Tensor, ...] = (of_sample, of_outputs)
        if kind == _CORRECTION:
            columns = (torch.zeros_like(of_sample), of_output_after, of_sample, of_outputs)
        return self._rows(index, torch.cat(columns, dim=1), snr, of_noise=not self.predict_x0)

    def _updates(self, start: Tensor, order: int, snr: LogSnr, corrects: bool) -> Tensor:
        """Steps from noise levels to the next ones (2302.04867, eq. 3 and 4).

        Args:
            start: positions of the noise levels, [n].
            order: number of predictions, from `start` backwards.
            corrects: the prediction at the next level is known, too.

        Returns:
            Factors of x at `start`, of `solver_order` predictions, the newest first, and of the
            prediction at the next level, float64 [n, solver_order + 2].
        """
        now, end = snr.at(start), snr.at(start + 1)
        x, *outputs, output_after = torch.eye(self.solver_order + 2, dtype=torch.float64)
        h = end.lam - now.lam
        signed = -h if self.predict_x0 else h
        growth = torch.expm1(signed)
        base = signed if self.config.solver_type == "bh1" else growth
        ratios = [(snr.at(start - age).lam - now.lam) / h for age in range(1, order)]
        differences = [
            (output - outputs[0]) / ratio
            for output, ratio in zip(outputs[1:], ratios, strict=False)
        ]
        if corrects:
            differences.append(output_after - outputs[0])
        if self.predict_x0:
            kept, scale, of_newest = end.sigma / now.sigma, end.alpha, end.alpha * growth
        else:
            kept, scale = end.alpha / now.alpha, end.sigma
            # At σ_t = 0 the product is 0·∞, whose limit this is.
            limit = end.alpha * now.sigma / now.alpha
            of_newest = torch.where(end.sigma == 0, limit, end.sigma * growth)
        update = kept * x - of_newest * outputs[0]
        if differences:
            weights = _difference_weights(ratios, signed, growth, base, corrects).double()
            pairs = zip(weights.split(1, dim=1), differences, strict=True)
            residual = sum((weight * difference for weight, difference in pairs), start=0 * x)
            update = update - scale * base * residual
        return update

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
    ) -> SchedulerOutput | tuple[Tensor]:
        """Correct the sample and go to the run's next noise level.

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: the entry of `timesteps`; only the first step of a run looks at it.
            sample: x_t, [B, …].
            return_dict: give a `SchedulerOutput`; otherwise a tuple.
            model_output_uncond, guidance_scale, guidance_rescale: classifier-free guidance inside
                the step, as in `fastldm.ops.ddpm_step`.

        Returns:
            ``prev_sample`` with the dtype of `sample`.

        Raises:
            ConfigError: an argument is not accepted; the message names it.
        """
        index = self._advance(timestep)
        guidance: dict[str, Any] = {
            "model_output_uncond": model_output_uncond,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        corrects = self.last_sample is not None and index - 1 not in self.disable_corrector
        row = self._table(sample, _CORRECTION if corrects else _PREDICTION)[index]
        earlier: list[Tensor | None] = [*self.model_outputs]
        earlier += [None] * (self.solver_order - len(earlier))
        others = [self.last_sample, *earlier] if corrects else earlier[: self.solver_order - 1]
        output = self._linear_step(sample, model_output, row, others, guidance)
        prediction = output.pred_original_sample
        if not self.predict_x0:
            prediction = self._predicted_noise(sample, model_output, prediction, row, guidance)
        self.model_outputs = [prediction, *self.model_outputs][: self.solver_order]
        previous = output.prev_sample
        self.last_sample = sample
        if corrects:
            self.last_sample = output.prev_sample
            weights = self._table(sample, _AFTER_CORRECTION)[index].unbind()
            operands = [self.last_sample, *self.model_outputs]
            total = weighted_sum(weights[: len(operands)], operands, row.dtype)
            previous = total.to(sample.dtype)
        return SchedulerOutput(previous) if return_dict else (previous,)


def _difference_weights(
    ratios: Sequence[Tensor], signed: Tensor, growth: Tensor, base: Tensor, corrects: bool
) -> Tensor:
    """The weights ρ of the differences, which solve R·ρ = b (2302.04867, theorem 3.1).

    Args:
        ratios: r_k of the earlier predictions, [n, 1] each.
        signed: ±h, [n, 1].
        growth: eʰ − 1 of it.
        base: B(h).
        corrects: there is a difference with the next level, whose r is 1.

    Returns:
        [n, number of differences].
    """
    order = len(ratios) + 1
    if order == 1 or (order == 2 and not corrects):
        return torch.full_like(signed, 0.5)
    nodes = torch.cat((*ratios, torch.ones_like(signed)), dim=1)
    matrix = torch.stack([nodes**power for power in range(order)], dim=1)
    phi, factorial, right = growth / signed - 1, 1, []
    for power in range(1, order + 1):
        right.append(phi * factorial / base)
        factorial *= power + 1
        phi = phi / signed - 1 / factorial
    vector = torch.cat(right, dim=1)
    if not corrects:
        matrix, vector = matrix[:, :-1, :-1], vector[:, :-1]
    return torch.linalg.solve(matrix, vector)
