"""Times of calls by turns: on a GPU by CUDA events, with a cold and with a warm L2 cache."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Calls = Mapping[str, Callable[[], Any]]

_ROUNDS = 25
_WARM_UPS = 3
_SECONDS_A_TURN = 2e-4
_MOST_REPEATS = 20


@dataclass(frozen=True)
class Times:
    """Medians of one contestant, in seconds."""

    cold: float
    """Nothing of its operands is in the cache."""
    warm: float
    """Again and again on the same operands."""
    how: str
    """"graph": replays of a CUDA graph; "calls": from Python, launches included."""


class Clock(Protocol):
    """Times contestants in turns."""

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """The stream on which to build what is timed: a backward follows its forward there."""

    def times(self, calls: Calls, rounds: int = _ROUNDS) -> dict[str, Times]:
        """Of each call, interleaved."""


def clock_for(device: str) -> Clock:
    """The clock of a device."""
    return GpuClock() if device == "cuda" else CpuClock()


class GpuClock:
    """Replays of CUDA graphs between events, so that the gaps between launches stay out.

    Before each cold turn twice the size of the L2 cache is written. That also keeps the device busy
    until the turn's events and replay are in its queue.
    """

    def __init__(self) -> None:
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(size, dtype=torch.int8, device="cuda")
        self._stream = torch.cuda.Stream()

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def times(self, calls: Calls, rounds: int = _ROUNDS) -> dict[str, Times]:
        with self.on_stream():
            single = {name: self._captured(call, 1) for name, call in calls.items()}
            cold = self._medians({name: run for name, (run, _) in single.items()}, rounds, True)
            repeats = {
                name: max(1, min(_MOST_REPEATS, int(_SECONDS_A_TURN / seconds)))
                for name, seconds in cold.items()
            }
            several = {name: self._captured(calls[name], repeats[name])[0] for name in calls}
            warm = self._medians(several, rounds, False)
        found = {
            name: Times(cold[name], warm[name] / repeats[name], single[name][1]) for name in calls
        }
        del single, several
        torch.cuda.empty_cache()
        return found

    def _captured(self, call: Callable[[], Any], repeats: int) -> tuple[Callable[[], Any], str]:
        """What runs `call` so often, and how; not every call can be captured."""
        for _ in range(_WARM_UPS):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # Without torch.cuda.graph, which collects garbage for every one of thousands.
            graph.capture_begin()
            try:
                for _ in range(repeats):
                    call()
            finally:
                graph.capture_end()
        except RuntimeError:
            torch.cuda.synchronize()
            return lambda: [call() for _ in range(repeats)], "calls"
        return graph.replay, "graph"

    def _medians(self, runs: Calls, rounds: int, is_cold: bool) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if is_cold:
                    self._flush.zero_()
                start.record()
                run()
                end.record()
                end.synchronize()
                if turn:
                    times[name].append(start.elapsed_time(end) / 1e3)
        return {name: statistics.median(values) for name, values in times.items()}


class CpuClock:
    """For the dry run: one call each. There is one cache state, and no graph."""

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def times(self, calls: Calls, rounds: int = 1) -> dict[str, Times]:
        times = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            times[name] = Times(seconds, seconds, "calls")
        return times
