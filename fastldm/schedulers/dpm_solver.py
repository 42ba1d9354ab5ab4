"""The updates of DPM-Solver (2206.00927), DPM-Solver++ (2211.01095) and their SDE variants.

A step integrates the model's prediction, a polynomial in λ, exactly from level s to level t with
h = λ_t − λ_s. The polynomial is given by its value D0 at s and its scaled derivatives D1 and D2.

=================  ==========  ====================================================================
algorithm          prediction  update, with weights w of h
=================  ==========  ====================================================================
dpmsolver++        x₀          σ_t/σ_s·x + α_t·(w₀·D0 + w₁·D1 + w₂·D2)
sde-dpmsolver++    x₀          σ_t/σ_s·e⁻ʰ·x + α_t·(w₀·D0 + w₁·D1 + w₂·D2) + σ_t·√(1−e⁻²ʰ)·noise
dpmsolver          ε           α_t/α_s·x + σ_t·(w₀·D0 + w₁·D1 + w₂·D2)
sde-dpmsolver      ε           α_t/α_s·x + σ_t·(w₀·D0 + w₁·D1) + σ_t·√(e²ʰ−1)·noise
=================  ==========  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import VARIANCE_TYPES
from fastldm.schedulers.checks import check_choice, check_integer
from fastldm.schedulers.preserving import LogSnr, PreservingScheduler

_SOLVER_TYPES = ("midpoint", "heun")
_FOREIGN_SOLVER_TYPES = ("logrho", "bh1", "bh2")
_ORDERS = (1, 2, 3)


class _Weights(NamedTuple):
    """The scalars of an update, [n, 1] each."""

    kept: Tensor
    """Factor of x."""
    scale: Tensor
    """Common factor of the differences."""
    exact: tuple[Tensor, Tensor, Tensor]
    """w₀, w₁ and w₂."""
    midpoint: Tensor
    """w₁ by the midpoint rule."""
    spread: Tensor
    """Variance of the noise in units of σ_t²."""


def _dpmsolver_plus_plus(start: LogSnr, end: LogSnr, h: Tensor) -> _Weights:
    decay = torch.exp(-h) - 1.0
    exact = (-decay, decay / h + 1.0, -((decay + h) / h**2 - 0.5))
    return _Weights(
        end.sigma / start.sigma, end.alpha, exact, -0.5 * decay, torch.zeros_like(decay)
    )


def _sde_dpmsolver_plus_plus(start: LogSnr, end: LogSnr, h: Tensor) -> _Weights:
    growth = 1.0 - torch.exp(-2.0 * h)
    exact = (growth, growth / (-2.0 * h) + 1.0, (growth - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
    kept = end.sigma / start.sigma * torch.exp(-h)
    return _Weights(kept, end.alpha, exact, 0.5 * growth, growth)


def _dpmsolver(start: LogSnr, end: LogSnr, h: Tensor) -> _Weights:
    growth = torch.exp(h) - 1.0
    exact = (-growth, -(growth / h - 1.0), -((growth - h) / h**2 - 0.5))
    return _Weights(
        end.alpha / start.alpha, end.sigma, exact, -0.5 * growth, torch.zeros_like(growth)
    )


def _sde_dpmsolver(start: LogSnr, end: LogSnr, h: Tensor) -> _Weights:
    once = _dpmsolver(start, end, h)
    exact = (2 * once.exact[0], 2 * once.exact[1], torch.full_like(h, float("nan")))
    spread = torch.exp(2.0 * h) - 1.0
    return _Weights(once.kept, once.scale, exact, 2 * once.midpoint, spread)


_ALGORITHMS: dict[str, Callable[[LogSnr, LogSnr, Tensor], _Weights]] = {
    "dpmsolver++": _dpmsolver_plus_plus,
    "sde-dpmsolver++": _sde_dpmsolver_plus_plus,
    "dpmsolver": _dpmsolver,
    "sde-dpmsolver": _sde_dpmsolver,
}


def integrate(
    algorithm: str,
    start: LogSnr,
    end: LogSnr,
    sample: Tensor,
    differences: Sequence[Tensor],
    noise: Tensor,
    *,
    midpoint: bool = False,
) -> Tensor:
    """The update from `start` to `end`, as the table above has it.

    A linear update is known by what it makes of unit vectors. These are in float64, so that nothing
    is rounded beyond the scalars, which have the precision of the schedule.

    Args:
        algorithm: one of the table's.
        start, end: levels s and t, [n, 1] each.
        sample, noise: unit vectors, float64 [K].
        differences: D0, D1, … made of unit vectors, [K] or [n, K].
        midpoint: take the midpoint rule's weight of D1.

    Returns:
        float64 [n, K].
    """
    weights = _ALGORITHMS[algorithm](start, end, end.lam - start.lam)
    factors = list(weights.exact)
    if midpoint:
        factors[1] = weights.midpoint
    update = weights.kept * sample
    for factor, difference in zip(factors, differences, strict=False):
        update = update + weights.scale * factor * difference
    if algorithm.startswith("sde"):
        update = update + end.sigma * weights.spread.sqrt() * noise
    return update


class DPMSolver(PreservingScheduler):
    """Base of the multistep and the singlestep solver: the fields that both have."""

    def _set_solver(self, algorithms: tuple[str, ...]) -> None:
        """Take over the config's algorithm, and check it.

        As in diffusers, DEIS's and UniPC's names stand for the closest solver there is here.
        """
        config = self.config
        check_integer("solver_order", config.solver_order, minimum=1)
        if config.solver_order not in _ORDERS:
            raise ConfigError(f"solver_order: got {config.solver_order}; accepted: 1, 2, 3")
        if config.algorithm_type == "deis":
            self.register_config(algorithm_type="dpmsolver++")
        if config.solver_type in _FOREIGN_SOLVER_TYPES:
            self.register_config(solver_type="midpoint")
        check_choice("algorithm_type", self.config.algorithm_type, algorithms)
        check_choice("solver_type", self.config.solver_type, _SOLVER_TYPES)
        if config.variance_type is not None:
            check_choice("variance_type", config.variance_type, VARIANCE_TYPES)
        self.algorithm: str = self.config.algorithm_type
        self.predicts_noise = not self.algorithm.endswith("++")
        self.is_stochastic = self.algorithm.startswith("sde")
        self.solver_order: int = config.solver_order
        if self.predicts_noise and config.final_sigmas_type == "zero":
            raise ConfigError(
                f"final_sigmas_type: got 'zero'; accepted with algorithm_type {self.algorithm!r}: "
                "sigma_min"
            )
