"""A function and its peers, timed in turn, so that the machine is the same for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def compare(
    benchmark: Any, own: Callable[[], Any], peers: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Time `own` and every peer once a round; each runs once before.

    Returns:
        Peer → its median over that of `own`: above 1, `own` is faster. They are stored with the
        benchmark, too, and the medians in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in peers}

    def time_peers() -> None:
        for name, peer in peers.items():
            start = time.perf_counter()
            peer()
            times[name].append(time.perf_counter() - start)

    own()
    time_peers()
    for values in times.values():
        values.clear()
    benchmark.pedantic(own, setup=time_peers, rounds=rounds)
    median = benchmark.stats.stats.median
    ratios = {name: statistics.median(values) / median for name, values in times.items()}
    for name, ratio in ratios.items():
        benchmark.extra_info[f"{name}, ms"] = round(ratio * median * 1e3, 3)
        benchmark.extra_info[f"{name} / own"] = round(ratio, 2)
    return ratios
