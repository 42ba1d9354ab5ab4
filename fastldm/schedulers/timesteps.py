"""Which of the training time steps a sampler visits."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastldm.errors import ConfigError

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
COMPVIS_SPACINGS = ("uniform", "quad")
"""Those of CompVis's samplers, which need not visit the number of time steps asked for."""


def spaced_timesteps(
    num_inference_steps: int, num_train_timesteps: int, timestep_spacing: str, steps_offset: int = 0
) -> Tensor:
    """Time steps in descending order (2305.08891, table 2, and CompVis's samplers).

    Args:
        num_inference_steps: S, from 1 to T.
        num_train_timesteps: T.
        timestep_spacing: ``"leading"`` visits S multiples of ⌊T/S⌋ from 0, ``"linspace"`` spans 0
            to T − 1 inclusively, ``"trailing"`` visits T − 1 and every T/S-th before it.
            ``"uniform"`` is CompVis's: all multiples of ⌊T/S⌋ below T, which are more than S where
            S does not divide T (S = 400 of T = 1000 gives 500). ``"quad"`` is CompVis's, too:
            ⌊i²·0.8·T/(S−1)²⌋ for i < S, each once, which are fewer than S where S is large.
        steps_offset: added to all but linspace and trailing time steps, as far as the first of
            them stays below T. CompVis's samplers have an offset of 1.

    Returns:
        int64 [S], or another number with CompVis's spacings.

    Raises:
        ConfigError: `num_inference_steps` is not an integer from 1 to T.
    """
    steps, total = check_step_count(num_inference_steps, num_train_timesteps), num_train_timesteps
    if timestep_spacing == "linspace":
        return _descending(np.linspace(0, total - 1, steps).round())
    if timestep_spacing == "trailing":
        # The range's own length is off by one for some S, where rounding lets it reach 0.
        return _descending((np.arange(total, 0, -total / steps)[:steps].round() - 1)[::-1])
    if timestep_spacing == "leading":
        values = np.arange(steps) * (total // steps)
    elif timestep_spacing == "uniform":
        values = np.arange(0, total, total // steps)
    else:
        # Repeated time steps change nothing in DDIM: the sample stays where it is.
        values = np.unique((np.linspace(0, np.sqrt(0.8 * total), steps) ** 2).astype(np.int64))
    return _descending(values + min(steps_offset, total - 1 - int(values[-1])))


def _descending(ascending: np.ndarray) -> Tensor:
    return torch.from_numpy(ascending[::-1].astype(np.int64))


def custom_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> Tensor:
    """Check time steps that the caller chose.

    Returns:
        int64 [S].

    Raises:
        ConfigError: there are none, they do not descend strictly, or one is outside [0, T).
    """
    values = [int(value) for value in timesteps]
    descending = all(after < before for before, after in itertools.pairwise(values))
    if not values or not descending or values[0] >= num_train_timesteps or values[-1] < 0:
        raise ConfigError(
            f"timesteps: got {_abbreviate(values)}; accepted: integers from "
            f"{num_train_timesteps - 1} down to 0 in strictly descending order"
        )
    return torch.tensor(values, dtype=torch.int64)


def check_step_count(num_inference_steps: int | None, num_train_timesteps: int) -> int:
    """The number of steps as an int.

    Raises:
        ConfigError: it is not an integer from 1 to T.
    """
    try:
        steps = operator.index(num_inference_steps)  # type: ignore[arg-type]
    except TypeError:
        steps = 0
    if not 1 <= steps <= num_train_timesteps:
        raise ConfigError(
            f"num_inference_steps: got {num_inference_steps!r}; accepted: an integer from 1 to "
            f"{num_train_timesteps} (num_train_timesteps)"
        )
    return steps


def _abbreviate(values: list[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, values[:limit]))
    return f"[{shown}, …]" if len(values) > limit else f"[{shown}]"
