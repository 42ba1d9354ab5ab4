"""The scalars of one sampling step, packed so that one small device tensor serves every step.

A step's scalars depend on the schedule and never on the data, so they are computed for a whole
schedule at once and row `i` is handed to the step. A captured CUDA graph or a compiled loop reads
them from the same buffer at each replay.

====================  =========================================================================
`DDIMCoefficient`     meaning (2010.02502; ᾱ is that paper's α)
====================  =========================================================================
SQRT_ALPHA            √ᾱ_t
SQRT_BETA             √(1 − ᾱ_t)
SQRT_ALPHA_PREV       √ᾱ_prev
DIRECTION             √(1 − ᾱ_prev − σ²), the factor of "the direction pointing to x_t", eq. 12
SIGMA                 σ = η √((1 − ᾱ_prev)/(1 − ᾱ_t)) √(1 − ᾱ_t/ᾱ_prev), eq. 16
====================  =========================================================================

====================  =========================================================================
`DDPMCoefficient`     meaning (2006.11239; α_t = ᾱ_t/ᾱ_prev and β_t = 1 − α_t of this step)
====================  =========================================================================
SQRT_ALPHA            √ᾱ_t
SQRT_BETA             √(1 − ᾱ_t)
ORIGINAL              √ᾱ_prev β_t/(1 − ᾱ_t), the factor of x₀ in μ̃, eq. 7
SAMPLE                √α_t (1 − ᾱ_prev)/(1 − ᾱ_t), the factor of x_t in μ̃, eq. 7
SIGMA                 σ of a fixed variance; 1 for a learned one; 0 where no noise is added
LOG_VARIANCE_MIN      log β̃_t with β̃_t = (1 − ᾱ_prev)/(1 − ᾱ_t) β_t, eq. 7
LOG_VARIANCE_MAX      log β_t
====================  =========================================================================
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from fastldm.errors import ConfigError

FIXED_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
VARIANCE_TYPES = (*FIXED_VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES)

_SMALLEST_VARIANCE = 1e-20
"""Keeps log β̃ finite at the step to x₀, where β̃ is 0 (as in Improved DDPM, 2102.09672)."""


class DDIMCoefficient(IntEnum):
    """Position of each scalar in the last dimension of `ddim_coefficients`' result."""

    SQRT_ALPHA = 0
    SQRT_BETA = 1
    SQRT_ALPHA_PREV = 2
    DIRECTION = 3
    SIGMA = 4


class DDPMCoefficient(IntEnum):
    """Position of each scalar in the last dimension of `ddpm_coefficients`' result."""

    SQRT_ALPHA = 0
    SQRT_BETA = 1
    ORIGINAL = 2
    SAMPLE = 3
    SIGMA = 4
    LOG_VARIANCE_MIN = 5
    LOG_VARIANCE_MAX = 6


def ddim_coefficients(alpha: Tensor, alpha_prev: Tensor, eta: float = 0.0) -> Tensor:
    """Pack the scalars of DDIM steps (2010.02502, eq. 12 and 16).

    Args:
        alpha: ᾱ_t of each step, any shape S, in the precision the scalars shall have.
        alpha_prev: ᾱ of the time step that the step leads to, shape S.
        eta: η in [0, 1]: 0 is the deterministic DDIM, 1 has the variance of DDPM.

    Returns:
        A tensor [*S, 5] in the order of `DDIMCoefficient`.

    Raises:
        ConfigError: `eta` is outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta: got {eta}; accepted: a number from 0 (DDIM) to 1 (DDPM)")
    beta, beta_prev = 1 - alpha, 1 - alpha_prev
    sigma = eta * (beta_prev / beta * (1 - alpha / alpha_prev)).sqrt()
    direction = (beta_prev - sigma**2).sqrt()
    return torch.stack((alpha.sqrt(), beta.sqrt(), alpha_prev.sqrt(), direction, sigma), dim=-1)


def ddpm_coefficients(
    alpha: Tensor,
    alpha_prev: Tensor,
    variance_type: str = "fixed_small",
    add_noise: Tensor | bool = True,
) -> Tensor:
    """Pack the scalars of DDPM steps (2006.11239, eq. 7 and section 3.2).

    Args:
        alpha: ᾱ_t of each step, any shape S, in the precision the scalars shall have.
        alpha_prev: ᾱ of the time step that the step leads to, shape S; 1 for the step to x₀.
        variance_type: ``"fixed_small"`` (σ² = β̃), ``"fixed_large"`` (σ² = β), the same two with
            the suffix ``"_log"`` (computed through their logarithm), ``"learned"`` (the model
            gives σ²) or ``"learned_range"`` (the model gives the position between log β̃ and
            log β, 2102.09672, eq. 15).
        add_noise: bool, or a bool tensor S: false where the step adds no noise (t = 0).

    Returns:
        A tensor [*S, 7] in the order of `DDPMCoefficient`.

    Raises:
        ConfigError: `variance_type` is none of these.
    """
    beta, beta_prev = 1 - alpha, 1 - alpha_prev
    alpha_step = alpha / alpha_prev
    beta_step = 1 - alpha_step
    variance = (beta_prev / beta * beta_step).clamp(min=_SMALLEST_VARIANCE)
    if variance_type == "fixed_small":
        sigma = variance.sqrt()
    elif variance_type == "fixed_small_log":
        sigma = (0.5 * variance.log()).exp()
    elif variance_type == "fixed_large":
        sigma = beta_step.sqrt()
    elif variance_type == "fixed_large_log":
        sigma = (0.5 * beta_step.log()).exp()
    elif variance_type in LEARNED_VARIANCE_TYPES:
        sigma = torch.ones_like(variance)
    else:
        raise ConfigError(
            f"variance_type: got {variance_type!r}; accepted: {', '.join(VARIANCE_TYPES)}"
        )
    gate = torch.as_tensor(add_noise, device=sigma.device)
    sigma = torch.where(gate, sigma, torch.zeros_like(sigma))
    original = alpha_prev.sqrt() * beta_step / beta
    current = alpha_step.sqrt() * beta_prev / beta
    return torch.stack(
        (alpha.sqrt(), beta.sqrt(), original, current, sigma, variance.log(), beta_step.log()),
        dim=-1,
    )
