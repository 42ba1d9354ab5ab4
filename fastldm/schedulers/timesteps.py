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


def spaced_timesteps(
    num_inference_steps: int, num_train_timesteps: int, timestep_spacing: str, steps_offset: int = 0
) -> Tensor:
    """`num_inference_steps` time steps in descending order (2305.08891, table 2).

    Args:
        num_inference_steps: S, from 1 to T.
        num_train_timesteps: T.
        timestep_spacing: ``"leading"`` visits multiples of ⌊T/S⌋ from 0, ``"linspace"`` spans 0 to
            T − 1 inclusively, ``"trailing"`` visits T − 1 and every T/S-th before it.
        steps_offset: added to leading time steps, as far as the first of them stays below T.
            CompVis's samplers visit ``"leading"`` time steps with an offset of 1.

    Returns:
        int64 [S].

    Raises:
        ConfigError: `num_inference_steps` is not an integer from 1 to T.
    """
    steps, total = _step_count(num_inference_steps, num_train_timesteps), num_train_timesteps
    values: np.ndarray
    if timestep_spacing == "linspace":
        values = np.linspace(0, total - 1, steps).round()[::-1]
    elif timestep_spacing == "leading":
        ratio = total // steps
        offset = min(steps_offset, total - 1 - (steps - 1) * ratio)
        values = (np.arange(steps) * ratio + offset)[::-1]
    else:
        # The range's own length is off by one for some S, where rounding lets it reach 0.
        values = np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
    return torch.from_numpy(values.astype(np.int64))


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


def _step_count(num_inference_steps: int, num_train_timesteps: int) -> int:
    try:
        steps = operator.index(num_inference_steps)
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
