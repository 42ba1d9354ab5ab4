"""How much of a run is done: by steps, by minutes, or by whichever ends first."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Counts the steps and seconds of a run, those before a restart included.

    Args:
        max_steps: optimiser steps of the whole run, or None.
        max_minutes: minutes of the whole run, or None. One of the two must be given.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        max_steps: int | None,
        max_minutes: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_steps = max_steps
        self.max_seconds = None if max_minutes is None else max_minutes * 60.0
        self.step = 0
        self._clock = clock
        self._before = 0.0
        self._started = clock()
        self._steps_before = 0

    def restart(self, step: int, elapsed: float) -> None:
        """Go on from a checkpoint."""
        self.step = self._steps_before = step
        self._before = elapsed
        self._started = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self._before + self._clock() - self._started

    def progress(self, elapsed: float | None = None) -> float:
        """The share of the budget that is used, 0…1; at 1 the run is over.

        Args:
            elapsed: seconds so far, where all processes must agree on them; else read here.
        """
        shares = [0.0]
        if self.max_steps is not None:
            shares.append(self.step / self.max_steps)
        if self.max_seconds is not None:
            shares.append((self.elapsed if elapsed is None else elapsed) / self.max_seconds)
        return min(1.0, max(shares))

    def seconds_left(self) -> float | None:
        """An estimate; None before the first step of a run that only counts steps."""
        estimates = []
        done = self.step - self._steps_before
        if self.max_steps is not None and done:
            per_step = (self.elapsed - self._before) / done
            estimates.append(per_step * (self.max_steps - self.step))
        if self.max_seconds is not None:
            estimates.append(self.max_seconds - self.elapsed)
        return max(0.0, min(estimates)) if estimates else None
