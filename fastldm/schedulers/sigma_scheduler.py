"""What the samplers share that go down a list of noise levels and count their steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import DiffusionStepOutput
from fastldm.schedulers.checks import HUGE, TINY, check_choice, check_number
from fastldm.schedulers.linear_step import linear_step
from fastldm.schedulers.noise_levels import (
    Levels,
    space_levels,
    timesteps_of_levels,
    training_levels,
)
from fastldm.schedulers.noise_scheduler import NoiseScheduler, compute_dtype

_SMALLEST_ALPHA = 2.0**-24
"""Stands for ᾱ_T = 0, whose noise level would be infinite."""

_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}
"""How noise levels are spaced, by the field that says so."""


class SigmaScheduler(NoiseScheduler, ABC):
    """Base of the samplers that go down a list of noise levels σ = √((1−ᾱ)/ᾱ).

    Which step comes next is counted on the host. Its scalars are a row of a table that the run's
    first step puts on the device of the sample; from then on nothing is copied to or from the
    device. The first step reads its time step back, unless `set_begin_index` says where the run
    begins, which also computes the table, so that a compiled step finds it.

    Attributes:
        sigmas: the noise levels, the last included, on the CPU in `schedule_dtype`.
        timesteps: the time steps to visit, one a model evaluation; may be replaced.
        step_index: position in `timesteps` of the next step; None before the first.
        begin_index: position of the first step, if it has been set.
    """

    _table_options: ClassVar[tuple[tuple[float, ...], ...]] = ((),)
    """Of the tables that steps read whose arguments have their defaults."""

    def _set_schedule(self) -> None:
        super()._set_schedule()
        if self.config.get("rescale_betas_zero_snr", False):
            self.alphas_cumprod[-1] = _SMALLEST_ALPHA
        self._set_spacing()
        training = training_levels(self.alphas_cumprod)
        self._use_levels(np.arange(len(training))[::-1], training[::-1], 0.0, None)

    def _set_spacing(self) -> None:
        """Take over how the config spaces noise levels, and check it."""
        config = self.config
        chosen = [name for name in _SPACINGS if config.get(name)]
        if len(chosen) > 1:
            raise ConfigError(f"{', '.join(chosen)}: at most one of them may be True")
        self.level_spacing = _SPACINGS[chosen[0]] if chosen else None
        for name in ("sigma_min", "sigma_max"):
            if config.get(name) is not None:
                check_number(name, config[name], TINY, HUGE)
        if "final_sigmas_type" in config:
            check_choice("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))

    @property
    def timesteps(self) -> Tensor:
        """The time steps to visit."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._timesteps = value
        self._visited: list[float] = value.tolist()

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position in `timesteps` of the first step, if it has been set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int | None = 0) -> None:
        """Say where in `timesteps` the run begins, for image-to-image sampling."""
        self._begin_index = begin_index
        if begin_index is not None:
            for options in self._table_options:
                self._scalars(begin_index, *options)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the time steps of a sampling run, and begin it.

        Args:
            num_inference_steps: S, from 1 to T.
            device: where `timesteps` is put; the CPU by default.
            timesteps: the time steps themselves, strictly descending, in place of a number.
            sigmas: the noise levels themselves, the last included (usually 0), descending, in
                place of a number.

        Raises:
            ConfigError: not exactly one of number, time steps and noise levels is given, or they
                are not accepted, or time steps are given though the config spaces noise levels.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ConfigError("num_inference_steps, timesteps, sigmas: give exactly one of them")
        training = training_levels(self.alphas_cumprod)
        if sigmas is not None:
            levels = _checked_levels(sigmas).astype(training.dtype)
            visited = timesteps_of_levels(levels[:-1], training)
            self._use_levels(visited, levels[:-1], float(levels[-1]), device)
            self.num_inference_steps = len(visited)
            return
        if timesteps is not None:
            if self.level_spacing is not None:
                raise ConfigError(
                    f"timesteps: given, though the config spaces noise levels "
                    f"({self.level_spacing})"
                )
            visited = _checked_timesteps(timesteps, self.num_train_timesteps)
        else:
            visited = self._spaced_timesteps(num_inference_steps)
        visited = self._cast_timesteps(visited)
        levels = self._levels_of(visited, training)
        if self.level_spacing is not None:
            first, last = self._level_range(levels, training)
            levels = space_levels(self.level_spacing, first, last, len(visited))
            visited = self._round_timesteps(timesteps_of_levels(levels, training))
        self._use_levels(visited, levels, self._final_level(levels, training), device)
        self.num_inference_steps = len(visited)

    @abstractmethod
    def _spaced_timesteps(self, num_inference_steps: int | None) -> Levels:
        """The time steps of a run, descending, as the config spaces them."""

    @abstractmethod
    def _cast_timesteps(self, timesteps: Levels) -> Any:
        """The array in the data type of `timesteps`."""

    def _levels_of(self, visited: Levels, training: Levels) -> Levels:
        return np.interp(visited, np.arange(len(training)), training)

    @abstractmethod
    def _level_range(self, levels: Levels, training: Levels) -> tuple[float, float]:
        """The largest and smallest noise level that the config's spacing fills."""

    def _round_timesteps(self, timesteps: Levels) -> Levels:
        return timesteps

    def _final_level(self, levels: Levels, training: Levels) -> float:
        """The noise level that the last step leads to."""
        ends_early = self.config.get("final_sigmas_type") == "sigma_min"
        return float(training[0]) if ends_early else 0.0

    def _use_levels(
        self,
        timesteps: Levels,
        levels: Levels,
        final_level: float,
        device: str | torch.device | None,
    ) -> None:
        """Take over the levels of a run: one a time step, and the one that the last leads to."""
        every = np.concatenate((levels, [final_level]))
        self.sigmas = torch.from_numpy(every).to(self.schedule_dtype)
        cast = np.ascontiguousarray(self._cast_timesteps(timesteps))
        self.timesteps = torch.from_numpy(cast).to(device)
        self._tables = {}
        self._computed: dict[tuple[float, ...], Tensor] = {}
        self._step_index: int | None = None
        self._begin_index = None
        self._first_index = 0
        self._forget()

    def _forget(self) -> None:
        """Drop what is kept between the steps of a run."""

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Position of a time step among those of the run.

        Of a time step that comes more than once in the middle it is the second, so that a run that
        begins there leaves out no noise level.

        Raises:
            ConfigError: the run does not visit `timestep`.
        """
        value = float(timestep)
        visited = self._visited if schedule_timesteps is None else schedule_timesteps.tolist()
        found = [index for index, entry in enumerate(visited) if entry == value]
        if not found:
            raise ConfigError(
                f"timestep: got {value:g}; accepted: one of the {len(visited)} in `timesteps`"
            )
        return found[1] if len(found) > 1 and found[0] > 0 else found[0]

    def _index(self, timestep: float | Tensor) -> int:
        """Position of the next step; the first step of a run looks for it."""
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
            self._first_index = self._step_index
        if self._step_index >= len(self.sigmas) - 1:
            raise ConfigError("timestep: the run has ended; call set_timesteps to begin another")
        return self._step_index

    def _advance(self, timestep: float | Tensor) -> int:
        """Position of the step that is to be made now."""
        index = self._index(timestep)
        self._step_index = index + 1
        return index

    def _level_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """σ of time steps [B] or [], broadcastable against `like`, in float32 or float64.

        Where `set_begin_index` has been called it is that of the next step, whatever `timesteps`.
        """
        levels = self._device_levels(like)
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            return levels[index]
        visited = self.timesteps.to(like.device)
        equal = visited == timesteps.to(like.device).reshape(-1, 1)
        number = equal.cumsum(dim=1)
        wanted = torch.where((number[:, -1:] > 1) & ~equal[:, :1], 2, 1)
        found = levels[(equal & (number == wanted)).int().argmax(dim=1)]
        # On a device nothing is read back, so a time step that is not visited must show.
        found = torch.where(equal.any(dim=1), found, float("nan"))
        if like.device.type == "cpu" and bool(found.isnan().any()):
            raise ConfigError(
                f"timesteps: got {timesteps.tolist()}; accepted: those in `timesteps`, which "
                "set_timesteps chose"
            )
        return found.reshape(-1, *(1,) * (like.ndim - 1))

    def _device_levels(self, like: Tensor) -> Tensor:
        key = ("sigmas", like.device, compute_dtype(like))
        if key not in self._tables:
            self._tables[key] = self.sigmas.to(like.device, compute_dtype(like))
        return self._tables[key]

    @abstractmethod
    def _make_table(self, first_index: int, *options: float) -> Tensor:
        """The scalars of the run's steps where it begins at `first_index`, float64 [N, K]."""

    def _table(self, sample: Tensor, *options: float) -> Tensor:
        """The table where `sample` is, in the precision of its steps."""
        dtype = compute_dtype(sample)
        key = (self._first_index, sample.device, dtype, *options)
        if key not in self._tables:
            table = self._scalars(self._first_index, *options)
            self._tables[key] = table.to(sample.device, dtype)
        return self._tables[key]

    def _scalars(self, first_index: int, *options: float) -> Tensor:
        """What `_make_table` gives, computed once a run."""
        key = (first_index, *options)
        if key not in self._computed:
            self._computed[key] = self._make_table(first_index, *options)
        return self._computed[key]

    def _linear_step(
        self,
        sample: Tensor,
        model_output: Tensor,
        row: Tensor,
        others: Sequence[Tensor | None],
        guidance: dict[str, Any],
    ) -> DiffusionStepOutput:
        """A step as `row` says, with x₀ limited as the config says."""
        limits = self._limits(sample, model_output, row[: len(row) - len(others)], guidance)
        options = {"prediction_type": self.prediction_type, **limits, **guidance}
        return linear_step(sample, model_output, row, others, **options)


def _checked_timesteps(timesteps: Sequence[float], num_train_timesteps: int) -> Levels:
    values = np.asarray(timesteps, dtype=np.float64)
    inside = values.ndim == 1 and len(values) > 0
    inside = inside and bool((values >= 0).all() and (values <= num_train_timesteps - 1).all())
    if not inside or not bool((np.diff(values) < 0).all()):
        raise ConfigError(
            f"timesteps: got {timesteps}; accepted: numbers from {num_train_timesteps - 1} down to "
            "0 in strictly descending order"
        )
    return values


def _checked_levels(sigmas: Sequence[float]) -> Levels:
    values = np.asarray(sigmas, dtype=np.float64)
    falls = values.ndim == 1 and len(values) > 1 and bool((np.diff(values) < 0).all())
    if not falls or not values[-1] >= 0 or not np.isfinite(values[0]):
        raise ConfigError(
            f"sigmas: got {sigmas}; accepted: at least two noise levels in strictly descending "
            "order, the last at least 0"
        )
    return values
