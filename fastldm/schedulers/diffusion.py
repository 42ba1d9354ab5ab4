"""What DDPM and DDIM sampling share: the forward process and the tables of their steps."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.schedulers.base import randn
from fastldm.schedulers.noise_scheduler import NoiseScheduler, compute_dtype
from fastldm.schedulers.timesteps import COMPVIS_SPACINGS, TIMESTEP_SPACINGS, spaced_timesteps


class DiffusionScheduler(NoiseScheduler, ABC):
    """Base of the schedulers whose step is one of the fused operators.

    The scalars of the steps from every training time step are tabulated once a sampling run on
    the device of the sample; a step reads one row. With a time step given as a device tensor
    nothing is copied to or from the device, so the step can be captured in a CUDA graph or
    compiled once for all time steps.

    Attributes:
        betas, alphas, alphas_cumprod: [T] in `schedule_dtype`; ᾱ may be replaced.
        timesteps: int64, the time steps to visit in descending order; may be replaced.
        num_inference_steps: None before `set_timesteps`.
        init_noise_sigma: standard deviation of the noise that sampling starts from, 1.
    """

    init_noise_sigma = 1.0
    timestep_spacings: ClassVar[tuple[str, ...]] = (*TIMESTEP_SPACINGS, *COMPVIS_SPACINGS)

    def _set_schedule(self) -> None:
        super()._set_schedule()
        self.timesteps = torch.arange(self.num_train_timesteps - 1, -1, -1)

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of every training time step, [T]."""
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, value: Tensor) -> None:
        self._alphas_cumprod = value
        self._tables = {}

    @property
    def timesteps(self) -> Tensor:
        """The time steps to visit, int64, descending."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        visited = value.tolist()
        self._timesteps = value
        self._successors: dict[int, int] = dict(zip(visited, [*visited[1:], -1], strict=True))
        self._tables = {}

    def _spaced_timesteps(self, num_inference_steps: int) -> Tensor:
        return spaced_timesteps(
            num_inference_steps,
            self.num_train_timesteps,
            self.config.timestep_spacing,
            self.config.steps_offset,
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Sample q(x_t | x₀) = √ᾱ_t·x₀ + √(1−ᾱ_t)·noise (2006.11239, eq. 4).

        Args:
            original_samples: x₀, [B, …].
            noise: standard normal, shape of `original_samples`.
            timesteps: integers in [0, T), [B] or [].

        Returns:
            x_t, [B, …]; half precisions are rounded once, at the end.
        """
        signal, deviation = self._forward_scalars(timesteps, original_samples)
        noisy = signal * original_samples + deviation * noise
        return noisy.to(torch.promote_types(original_samples.dtype, noise.dtype))

    def previous_timestep(self, timestep: int) -> int:
        """The time step that a step from `timestep` leads to; negative for x₀.

        Raises:
            ConfigError: `timestep` is not one that the run visits.
        """
        if timestep not in self._successors:
            raise ConfigError(
                f"timestep: got {timestep}; accepted: one of the {len(self._successors)} in "
                "`timesteps`, which set_timesteps chose"
            )
        return self._successors[timestep]

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The time steps that steps start from, and those that they lead to, int64 [n] each."""
        device = self.alphas_cumprod.device
        visited = torch.tensor(list(self._successors), device=device)
        return visited, torch.tensor(list(self._successors.values()), device=device)

    def _alphas_of(self, timesteps: Tensor, final_alpha: Tensor) -> Tensor:
        """ᾱ of time steps; `final_alpha` where they are negative."""
        alphas = self.alphas_cumprod[timesteps.clamp(min=0)]
        return torch.where(timesteps >= 0, alphas, final_alpha.to(alphas))

    def _tabulate(self, visited: Tensor, rows: Tensor) -> Tensor:
        """The rows of `visited` time steps among those of all, [T, K].

        A time step given as a device tensor is not checked, so one that is not visited must show.
        """
        table = rows.new_full((self.num_train_timesteps, rows.shape[1]), float("nan"))
        table[visited] = rows
        return table

    @abstractmethod
    def _make_table(self, eta: float) -> Tensor:
        """The scalars of the steps from all training time steps, [T, K]; more rows may follow."""

    def _coefficients(
        self, timestep: int | Tensor, sample: Tensor, eta: float = 0.0, first_row: int = 0
    ) -> Tensor:
        """The scalars of the step from `timestep`: [K], or [B, K] for time steps [B].

        They stand in the table's row `first_row` + `timestep`.
        """
        if isinstance(timestep, Tensor) and timestep.shape == (1,):
            timestep = timestep[0]
        table = self._table(sample, eta)
        if not stays_on_device(timestep):
            return table[first_row + self._checked_timestep(timestep)]
        rows = table.index_select(0, first_row + timestep.to(sample.device).reshape(-1))
        return rows.reshape(*timestep.shape, table.shape[1])

    def _table(self, sample: Tensor, eta: float = 0.0) -> Tensor:
        """The table where `sample` is, in the precision of its steps."""
        dtype = compute_dtype(sample)
        key = (eta, sample.device, dtype)
        if key not in self._tables:
            self._tables[key] = self._make_table(eta).to(sample.device, dtype)
        return self._tables[key]

    def _checked_timestep(self, timestep: int | Tensor) -> int:
        try:
            value = operator.index(timestep)
        except TypeError:
            value = -1
        if not 0 <= value < self.num_train_timesteps:
            raise ConfigError(
                f"timestep: got {timestep!r}; accepted: an integer in "
                f"[0, {self.num_train_timesteps})"
            )
        self.previous_timestep(value)
        return value


def noise_arguments(
    timestep: int | Tensor,
    model_output: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    variance_noise: Tensor | None,
    seed: int | Tensor | None,
) -> dict[str, Any]:
    """The arguments by which a step operator adds noise.

    Raises:
        ConfigError: the noise is given in more than one way.
    """
    if sum(source is not None for source in (generator, variance_noise, seed)) > 1:
        raise ConfigError("generator, variance_noise, seed: give at most one of them")
    if seed is not None:
        offset = timestep
        if isinstance(timestep, Tensor):
            offset = timestep.to(model_output.device, torch.int64).squeeze()
        return {"seed": seed, "offset": offset}
    if variance_noise is None:
        variance_noise = randn(
            model_output.shape, generator, model_output.device, model_output.dtype
        )
    return {"noise": variance_noise}


def stays_on_device(timestep: int | Tensor) -> TypeGuard[Tensor]:
    """Whether reading the value of `timestep` would wait for a device or break a graph."""
    return isinstance(timestep, Tensor) and (
        timestep.ndim > 0 or timestep.device.type != "cpu" or torch.compiler.is_compiling()
    )
