"""Noise schedules: β_1 … β_T of the forward process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.schedulers.checks import check_choice, check_number

_MAX_BETA = 0.999
_SIGMOID_RANGE = 6.0


def _linear(start: float, end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """β linear in t (2006.11239, section 4)."""
    return torch.linspace(start, end, steps, dtype=dtype)


def _scaled_linear(start: float, end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """√β linear in t: the schedule of latent diffusion, which its code calls "linear"."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2


def _sqrt(start: float, end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """β² linear in t: the schedule that the latent diffusion code calls "sqrt"."""
    return torch.linspace(start, end, steps, dtype=dtype) ** 0.5


def _sigmoid(start: float, end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """β a sigmoid of t (GeoDiff, 2203.02923)."""
    position = torch.linspace(-_SIGMOID_RANGE, _SIGMOID_RANGE, steps, dtype=dtype)
    return torch.sigmoid(position) * (end - start) + start


def _squaredcos(_start: float, _end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """ᾱ a squared cosine of t (2102.09672, eq. 17)."""
    return _from_alpha_bar(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, steps, dtype)


def _laplace(_start: float, _end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """log SNR Laplace-distributed (2407.03297), in the form that diffusers has it."""

    def alpha_bar(t: float) -> float:
        log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
        snr = math.exp(log_snr)
        return math.sqrt(snr / (1 + snr))

    return _from_alpha_bar(alpha_bar, steps, dtype)


def _exp(_start: float, _end: float, steps: int, dtype: torch.dtype) -> Tensor:
    """ᾱ falls exponentially in t."""
    return _from_alpha_bar(lambda t: math.exp(-12.0 * t), steps, dtype)


def _from_alpha_bar(alpha_bar: Callable[[float], float], steps: int, dtype: torch.dtype) -> Tensor:
    values = [alpha_bar(step / steps) for step in range(steps + 1)]
    betas = [min(1 - after / before, _MAX_BETA) for before, after in itertools.pairwise(values)]
    return torch.tensor(betas, dtype=dtype)


_SCHEDULES: dict[str, Callable[[float, float, int, torch.dtype], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos,
    "sqrt": _sqrt,
    "sigmoid": _sigmoid,
    "laplace": _laplace,
    "exp": _exp,
}
BETA_SCHEDULES = tuple(_SCHEDULES)


def make_betas(
    beta_schedule: str,
    beta_start: float,
    beta_end: float,
    num_train_timesteps: int,
    trained_betas: Sequence[float] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The β of every training step.

    Args:
        beta_schedule: ``"linear"`` in β, ``"scaled_linear"`` in √β, ``"squaredcos_cap_v2"``
            (cosine), ``"sqrt"``, ``"sigmoid"``, ``"laplace"`` or ``"exp"``. CompVis's "linear" is
            ``"scaled_linear"`` here and its "sqrt_linear" is ``"linear"``.
        beta_start, beta_end: the ends of the schedule; without effect on the schedules that are
            given by ᾱ (cosine, Laplace, exponential).
        num_train_timesteps: T.
        trained_betas: the β themselves, [T], in place of a schedule.
        dtype: of the computation and the result.

    Returns:
        [T], in [0, 1].

    Raises:
        ConfigError: the schedule is unknown, a β or an end of the schedule lies outside [0, 1],
            or `trained_betas` has another length than T.
    """
    if trained_betas is None:
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_number("beta_start", beta_start, 0, 1)
        check_number("beta_end", beta_end, 0, 1)
        return _SCHEDULES[beta_schedule](beta_start, beta_end, num_train_timesteps, dtype)
    try:
        betas = torch.tensor([float(beta) for beta in trained_betas], dtype=dtype)
    except (TypeError, ValueError):
        raise ConfigError(f"trained_betas: got {trained_betas!r}; accepted: numbers") from None
    if len(betas) != num_train_timesteps:
        raise ConfigError(
            f"trained_betas: got {len(betas)} values; "
            f"accepted: one a training step (num_train_timesteps={num_train_timesteps})"
        )
    if not bool(((betas >= 0) & (betas <= 1)).all()):
        raise ConfigError(
            f"trained_betas: got values from {betas.min():g} to {betas.max():g}; "
            "accepted: numbers from 0 to 1"
        )
    return betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Change β so that ᾱ_T = 0: the last step is pure noise (2305.08891, algorithm 1).

    Args:
        betas: [T].

    Returns:
        [T]; √ᾱ is shifted so that it ends at 0 and scaled so that its first value stays.
    """
    root = (1 - betas).cumprod(dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat((alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]))
