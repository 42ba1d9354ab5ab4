"""Timing by turns: a slow moment of the machine slows all contestants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Contestants = dict[str, Callable[[], object]]

ROUNDS = 31
_SECONDS_A_TURN = 2e-3


@dataclass(frozen=True)
class Quartiles:
    """Of the times of a call, in seconds."""

    lower: float
    median: float
    upper: float


class Race(Protocol):
    """Times contestants in turns and keeps what it found."""

    def __call__(self, contestants: Contestants, rounds: int = ROUNDS) -> dict[str, Quartiles]: ...


def interleaved(contestants: Contestants, rounds: int = ROUNDS) -> dict[str, Quartiles]:
    """The time of a call of each contestant.

    Each has a turn in every round, of so many calls that the clock is fine enough.
    """
    repeats = {name: repeats_of(call) for name, call in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            times[name].append(_seconds(call, repeats[name]))
    return {
        name: Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))
        for name, values in times.items()
    }


def repeats_of(call: Callable[[], object]) -> int:
    """Calls in one turn, measured after one that warms up caches and compilers."""
    call()
    first = _seconds(call, 1)
    if first >= _SECONDS_A_TURN:
        return 1
    return max(1, round(_SECONDS_A_TURN / min(first, _seconds(call, 3))))


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
