"""Linear multistep sampling: Adams and Bashforth's method for unequal steps, as in k-diffusion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.ops import predict_original_sample
from fastldm.schedulers.base import SchedulerOutput
from fastldm.schedulers.checks import check_integer
from fastldm.schedulers.exploding import ExplodingScheduler
from fastldm.schedulers.noise_levels import Levels

_ORDER = 4


class LMSDiscreteScheduler(ExplodingScheduler):
    """The linear multistep method, with diffusers' fields and defaults.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: space the noise levels so, see
            `fastldm.schedulers.noise_levels.space_levels`; at most one of them.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"`` (2305.08891, table 2).
        steps_offset: added to ``"leading"`` time steps.
        schedule_dtype: ``"float32"`` computes the schedule as diffusers does.

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
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        schedule_dtype: str = "float32",
    ) -> None:
        self._set_schedule()
        self._set_limits()

    _table_options = ((_ORDER,),)

    def _forget(self) -> None:
        self.derivatives: list[Tensor] = []

    def _make_table(self, first_index: int, *options: float) -> Tensor:
        (order,) = options
        levels = self.sigmas.double()
        weights = torch.from_numpy(_multistep_weights(levels.numpy(), int(order)))
        sigma = levels[:-1]
        rows = self._rows(
            sigma, sigma, torch.ones_like(sigma), sigma + weights[:, 0], weights[:, 1:]
        )
        return torch.cat((rows, sigma.unsqueeze(-1)), dim=1)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = _ORDER,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Go to the run's next noise level.

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: the entry of `timesteps`; only the first step of a run looks at it.
            sample: x, [B, …]: not scaled as `scale_model_input` does.
            order: of the method: slopes that a step goes along, at least 1. Where a run begins in
                the middle, its first steps have too few of them, as in diffusers.
            return_dict: give a `SchedulerOutput`; otherwise a tuple.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, both with the dtype of `sample`.

        Raises:
            ConfigError: an argument is not accepted; the message names it.
        """
        check_integer("order", order, minimum=1)
        index = self._advance(timestep)
        row = self._table(sample, order)[index]
        row, sigma = row[:-1], row[-1]
        earlier = [*self.derivatives, *[None] * order][: order - 1]
        output = self._linear_step(sample, model_output, row, earlier, {})
        slope = model_output
        if self.prediction_type != "epsilon":
            coefficients = row[: len(row) - len(earlier)]
            original = predict_original_sample(
                sample, model_output, coefficients, prediction_type=self.prediction_type
            )
            slope = (sample.to(row.dtype) - original) / sigma
        self.derivatives = [slope, *self.derivatives][:order]
        return SchedulerOutput(*output) if return_dict else (output[0], output[1])


def _multistep_weights(levels: Levels, order: int) -> Levels:
    """∫ of the Lagrange polynomials through the slopes, the newest first, over each step.

    Args:
        levels: σ, [N + 1].
        order: polynomials of a step; the first steps, which have fewer slopes, have fewer.

    Returns:
        float64 [N, order].
    """
    count = len(levels) - 1
    weights = np.zeros((count, order))
    # Gauss's rule with n points is exact for polynomials of degree 2n − 1.
    points, shares = np.polynomial.legendre.leggauss((order + 1) // 2)
    for number in range(1, order + 1):
        steps = np.arange(number - 1, count if number == order else min(number, count))
        start, end = levels[steps], levels[steps + 1]
        sigma = (start + end)[:, None] / 2 + (end - start)[:, None] / 2 * points
        nodes = [levels[steps - age][:, None] for age in range(number)]
        for age, node in enumerate(nodes):
            product = np.ones_like(sigma)
            for other in nodes[:age] + nodes[age + 1 :]:
                product *= (sigma - other) / (node - other)
            weights[steps, age] = product @ shares * (end - start) / 2
    return weights
