"""Pseudo linear multistep sampling (Liu et al., "Pseudo numerical methods …", 2202.09778)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.ops import ddim_step
from fastldm.schedulers.base import SchedulerOutput
from fastldm.schedulers.linear_step import weighted_sum
from fastldm.schedulers.noise_scheduler import compute_dtype
from fastldm.schedulers.strided import StridedScheduler

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the model's outputs, the newest first, by their number (2202.09778, eq. 12)."""

_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_RUNGE_KUTTA_STEPS = 3


class PNDMScheduler(StridedScheduler):
    """PNDM and, with ``skip_prk_steps=True``, PLMS, with diffusers' fields and defaults.

    A step is a DDIM step (η = 0) with a weighted sum of the model's latest outputs. PLMS has too
    few of them at the start, so it takes its first step twice: the second time time step of
    `timesteps` comes twice. PNDM makes its first three steps by Runge and Kutta's method instead,
    with four evaluations each.

    CompVis's PLMS sampler is ``beta_schedule="scaled_linear", skip_prk_steps=True,
    steps_offset=1, timestep_spacing="uniform", schedule_dtype="float64"``.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: as in `fastldm.schedulers.make_betas`.
        skip_prk_steps: leave out the Runge-Kutta steps.
        set_alpha_to_one: the last step leads to ᾱ = 1 (x₀); otherwise to ᾱ of the first training
            time step.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        timestep_spacing: as in `fastldm.schedulers.spaced_timesteps`.
        steps_offset: added to the time steps, see `fastldm.schedulers.spaced_timesteps`.
        schedule_dtype: ``"float32"`` computes the schedule as diffusers does, ``"float64"`` as
            CompVis does.

    Raises:
        ConfigError: a field has a value that is not accepted; the message names it.
    """

    prediction_types = ("epsilon", "v_prediction")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        schedule_dtype: str = "float32",
    ) -> None:
        self._set_schedule()
        self._set_final_alpha()
        self.skip_prk_steps = skip_prk_steps
        self._start()

    def _start(self) -> None:
        self.counter = 0
        self.ets: list[Tensor] = []
        self.cur_sample: Tensor | None = None
        self._slope: Tensor | None = None

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Choose the time steps of a sampling run, and begin it.

        Args:
            num_inference_steps: S, from 1 to T; at least 4 with Runge-Kutta steps.
            device: where `timesteps` is put; the CPU by default.

        Raises:
            ConfigError: `num_inference_steps` is not accepted.
        """
        visited = self._spaced_timesteps(num_inference_steps).numpy()
        self.num_inference_steps = len(visited)
        self.prk_timesteps = np.empty(0, dtype=np.int64)
        if self.skip_prk_steps:
            # CompVis's sampler evaluates the model twice even where there is only one time step.
            twice = visited[1:2] if len(visited) > 1 or not self._goes_by_list else visited
            self.plms_timesteps = np.concatenate((visited[:2], twice, visited[2:]))
        elif len(visited) <= _RUNGE_KUTTA_STEPS:
            raise ConfigError(
                f"num_inference_steps: got {num_inference_steps}; accepted: at least "
                f"{_RUNGE_KUTTA_STEPS + 1}, unless skip_prk_steps is True"
            )
        else:
            half = self.num_train_timesteps // len(visited) // 2
            ends = visited[1 : _RUNGE_KUTTA_STEPS + 1]
            starts = visited[:_RUNGE_KUTTA_STEPS]
            self.prk_timesteps = np.stack(
                (starts, ends + half, ends + half, ends), axis=1
            ).flatten()
            self.plms_timesteps = visited[_RUNGE_KUTTA_STEPS:]
        timesteps = np.concatenate((self.prk_timesteps, self.plms_timesteps))
        self.timesteps = torch.from_numpy(timesteps).to(device)
        self._start()

    def _make_table(self, eta: float) -> Tensor:
        """The rows of steps from each time step, of repeated steps to each, of Runge and Kutta."""
        visited, previous = self._pairs()
        forward = self._tabulate(visited, self._rows(visited, previous))
        leads_back = previous >= 0
        repeated = self._tabulate(previous[leads_back], forward[visited[leads_back]])
        if self._goes_by_list:
            first = visited[:1]
            repeated[first] = forward[first]
        sources = torch.from_numpy(np.repeat(self.prk_timesteps[::4], 4))
        half = self.num_train_timesteps // self._run_length() // 2
        targets = torch.from_numpy(self.prk_timesteps) - half * (1 - torch.arange(len(sources)) % 2)
        return torch.cat((forward, repeated, self._rows(sources, targets)))

    def _rows(self, timesteps: Tensor, previous: Tensor) -> Tensor:
        """The scalars by which `ddim_step` goes between time steps (2202.09778, eq. 11)."""
        alpha = self._alphas_of(timesteps, self.final_alpha_cumprod).unsqueeze(-1)
        alpha_prev = self._alphas_of(previous, self.final_alpha_cumprod).unsqueeze(-1)
        beta, beta_prev = 1 - alpha, 1 - alpha_prev
        denominator = alpha * beta_prev.sqrt() + (alpha * beta * alpha_prev).sqrt()
        # A linear update is known by what it makes of unit vectors; they are in float64, so that
        # nothing is rounded beyond the precision of the schedule.
        x, noise = torch.eye(2, dtype=torch.float64, device=alpha.device)
        update = (alpha_prev / alpha).sqrt() * x - (alpha_prev - alpha) * noise / denominator
        of_x, of_noise = update.split(1, dim=-1)
        signal, deviation = alpha.sqrt().double(), beta.sqrt().double()
        # x = (√ᾱ·x₀ + √(1−ᾱ)·ε)/norm, where x₀ and ε are those that the step predicts.
        norm = signal**2 + deviation**2 if self.prediction_type == "v_prediction" else 1.0
        original, direction = of_x * signal / norm, of_x * deviation / norm + of_noise
        return torch.cat((signal, deviation, original, direction, torch.zeros_like(signal)), dim=-1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go on with the run; it must be called for every entry of `timesteps` in turn.

        Args:
            model_output: the model's prediction, shape of `sample`.
            timestep: t, one of `timesteps`: an int, or an integer tensor [] or [B]. A tensor on a
                device is not read back, so there an invalid time step is not reported.
            sample: the model's input, [B, …].
            return_dict: give a `SchedulerOutput`; otherwise a tuple.

        Returns:
            ``prev_sample`` with the dtype of `sample`: the next input of the model.

        Raises:
            ConfigError: `set_timesteps` has not been called, or an argument is not accepted; the
                message names it.
        """
        self._run_length()
        if self.counter < len(self.prk_timesteps):
            output = self._runge_kutta_output(model_output, sample)
            start = sample if self.cur_sample is None else self.cur_sample
            coefficients = self._table(sample)[2 * self.num_train_timesteps + self.counter]
        else:
            output = self._multistep_output(model_output, sample)
            repeats = self.counter == 1
            start = self.cur_sample if repeats and self.cur_sample is not None else sample
            coefficients = self._coefficients(
                timestep, sample, first_row=self.num_train_timesteps if repeats else 0
            )
        self.counter += 1
        previous = ddim_step(
            start, output, coefficients, prediction_type=self.prediction_type
        ).prev_sample
        return SchedulerOutput(previous) if return_dict else (previous,)

    def _runge_kutta_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The slope of the next of a step's four evaluations (2202.09778, eq. 13)."""
        stage = self.counter % 4
        share = _RUNGE_KUTTA[stage] * model_output.to(compute_dtype(sample))
        if stage == 0 or self._slope is None:
            self.ets = [*self.ets, model_output]
            self.cur_sample = sample
            self._slope = share
            return model_output
        self._slope = self._slope + share
        return self._slope if stage == 3 else model_output

    def _multistep_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The combination of the latest outputs that the step goes along."""
        dtype = compute_dtype(sample)
        if self.counter == 1 and self.ets:
            return (model_output.to(dtype) + self.ets[-1].to(dtype)) / 2
        self.ets = [*self.ets[1 - len(_ADAMS_BASHFORTH) :], model_output]
        if self.counter == 0:
            self.cur_sample = sample
        weights = _ADAMS_BASHFORTH[len(self.ets) - 1]
        return weighted_sum(weights, reversed(self.ets), dtype)
