"""Timing by turns: a slow moment of the machine slows all contestants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Contestants = dict[str, Callable[[], object]]
Timer = Callable[[], float]

ROUNDS = 31
_SECONDS_A_TURN = 2e-3


@dataclass(frozen=True)
class Quartiles:
    """Of the times of a call, in seconds."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class Times:
    """Of one contestant."""

    calls: int
    """In one turn."""
    turns: list[float]
    """Seconds a call, in each round."""

    @property
    def quartiles(self) -> Quartiles:
        """Of the turns; of a single one all three are its time."""
        if len(self.turns) == 1:
            return Quartiles(*self.turns * 3)
        return Quartiles(*statistics.quantiles(self.turns, n=4, method="inclusive"))


class Race(Protocol):
    """Times contestants in turns and keeps what it found."""

    def __call__(
        self, contestants: Contestants, rounds: int = ROUNDS, runs: int = 1
    ) -> dict[str, Times]: ...


class CudaTimer:
    """Seconds of the device's own time, by CUDA events on the current stream.

    The events are waited for, so that what was launched between two calls has ended, and only what
    lies between two calls counts.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        """Since the first call."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            # Step by step: an event's milliseconds are of single precision.
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


def timer_of(device: str) -> Timer:
    """The clock of a device."""
    return CudaTimer() if device == "cuda" else time.perf_counter


def interleaved(
    contestants: Contestants, rounds: int = ROUNDS, timer: Timer = time.perf_counter
) -> dict[str, Times]:
    """The time of a call of each contestant.

    Each has a turn in every round, of so many calls that the clock is fine enough. Each round
    begins with another one, so that none has the same predecessor's caches all the time.
    """
    calls = {name: repeats_of(call, timer) for name, call in contestants.items()}
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(_seconds(contestants[name], calls[name], timer))
    return {name: Times(calls[name], turns[name]) for name in contestants}


def repeats_of(call: Callable[[], object], timer: Timer = time.perf_counter) -> int:
    """Calls in one turn, measured after one that warms up caches and compilers."""
    call()
    first = _seconds(call, 1, timer)
    if first >= _SECONDS_A_TURN:
        return 1
    return max(1, round(_SECONDS_A_TURN / min(first, _seconds(call, 3, timer))))


def _seconds(call: Callable[[], object], count: int, timer: Timer) -> float:
    start = timer()
    for _ in range(count):
        call()
    return (timer() - start) / count
