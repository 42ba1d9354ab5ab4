"""How much of the processors other programs took while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STAT = Path("/proc/stat")
_BUSY = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat: user, nice, system, irq, softirq, and what the host took."""


class Disturbance:
    """What others took between two moments."""

    share: float | None = None
    """Of all processors' time; None where Linux does not say."""


@contextmanager
def watched() -> Iterator[Disturbance]:
    """Fill in the share of others when the block ends."""
    found = Disturbance()
    before = _busy_seconds(), time.process_time(), time.perf_counter()
    yield found
    after = _busy_seconds(), time.process_time(), time.perf_counter()
    if before[0] is None or after[0] is None:
        return
    others = (after[0] - before[0]) - (after[1] - before[1])
    available = (after[2] - before[2]) * (os.cpu_count() or 1)
    found.share = max(0.0, others / available)


def _busy_seconds() -> float | None:
    """Of all processors and programs, since the machine started."""
    if not _STAT.exists():
        return None
    columns = _STAT.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    return sum(int(columns[index]) for index in _BUSY) / os.sysconf("SC_CLK_TCK")
