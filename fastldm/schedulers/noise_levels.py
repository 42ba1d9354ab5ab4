"""Noise levels σ = √((1−ᾱ)/ᾱ), and how they can be spaced."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastldm.errors import ConfigError

Levels = NDArray[Any]

_KARRAS_RHO = 7.0
_BETA_SHAPE = 0.6


def training_levels(alphas_cumprod: Tensor) -> Levels:
    """σ of every training time step, ascending, [T]."""
    levels: Levels = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).cpu().numpy()
    return levels


def space_levels(spacing: str, first: float, last: float, count: int) -> Levels:
    """Descending noise levels between two.

    Args:
        spacing: ``"karras"`` (2206.00364, eq. 5, ρ = 7), ``"exponential"`` (even in log σ),
            ``"beta"`` (quantiles of the Beta(0.6, 0.6) distribution, 2407.12173; needs SciPy) or
            ``"lu"`` (even in the log SNR, 2211.01095, section 5.1).
        first, last: largest and smallest σ.
        count: N.

    Returns:
        float64 [N].

    Raises:
        ConfigError: ``"beta"`` without SciPy.
    """
    ramp = np.linspace(0, 1, count)
    if spacing == "karras":
        start, end = first ** (1 / _KARRAS_RHO), last ** (1 / _KARRAS_RHO)
        karras: Levels = (start + ramp * (end - start)) ** _KARRAS_RHO
        return karras
    if spacing == "beta":
        return last + _beta_quantiles(1 - ramp) * (first - last)
    exponential: Levels = np.exp(np.linspace(math.log(first), math.log(last), count))
    return exponential


def _beta_quantiles(probabilities: Levels) -> Levels:
    try:
        from scipy.stats import beta
    except ImportError:
        raise ConfigError("use_beta_sigmas: got True, which needs SciPy; install scipy") from None
    quantiles: Levels = beta.ppf(probabilities, _BETA_SHAPE, _BETA_SHAPE)
    return quantiles


def timesteps_of_levels(levels: Levels, training: Levels) -> Levels:
    """Fractional time steps whose σ are `levels`: log σ is linear between training time steps."""
    log_levels = np.log(np.maximum(levels, 1e-10))
    return np.interp(log_levels, np.log(training), np.arange(len(training)))
