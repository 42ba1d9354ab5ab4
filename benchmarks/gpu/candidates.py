"""Whether another tiling of a kernel is faster than the best one so far."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.contest import OURS

Call = Callable[[], Sequence[Tensor]]
Tiling = Callable[[], contextlib.AbstractContextManager[Any]]
"""A context in which kernels are launched with a tiling."""

BETTER = 0.98
"""A candidate is kept if it takes less than this share of the time, twice."""


@dataclass(frozen=True)
class Checked:
    """A call, and what its results have to be."""

    call: Call
    check: Callable[[str, Sequence[Tensor]], None]


def ratios(
    candidate: Tiling, best: Tiling, calls: Sequence[Checked], clock: Clock
) -> list[float] | str:
    """Time with the candidate over time with the best so far, twice; or why it cannot be.

    Over several calls it is the geometric mean.
    """
    found = []
    for _ in range(2):
        logarithms = []
        for checked in calls:
            contestants = {
                "candidate": _under(candidate, checked.call),
                "best": _under(best, checked.call),
            }
            try:
                with clock.on_stream():
                    checked.check(OURS, contestants["candidate"]())
                times = clock.times(contestants, rounds=9)
            except Exception as error:
                return f"{type(error).__name__}: {str(error).strip()[:200]}"
            logarithms.append(math.log(times["candidate"].cold / times["best"].cold))
        found.append(round(math.exp(sum(logarithms) / len(logarithms)), 4))
    return found


def _under(tiling: Tiling, call: Call) -> Call:
    def run() -> Sequence[Tensor]:
        with tiling():
            return call()

    return run
