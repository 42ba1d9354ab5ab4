"""Timing by turns: a slow moment of the machine slows all contestants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Contestants = dict[str, Callable[[], object]]
Race = Callable[[Contestants], dict[str, float]]

ROUNDS = 31
_SECONDS_A_TURN = 2e-3


def interleaved_medians(contestants: Contestants) -> dict[str, float]:
    """The median time of a call of each contestant, in seconds.

    Each has a turn in every round, of so many calls that the clock is fine enough.
    """
    repeats = {name: repeats_of(call) for name, call in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            times[name].append(_seconds(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def repeats_of(call: Callable[[], object]) -> int:
    """Calls in one turn, measured after a few that warm up caches and compilers."""
    _seconds(call, 2)
    return max(1, round(_SECONDS_A_TURN / _seconds(call, 3)))


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
