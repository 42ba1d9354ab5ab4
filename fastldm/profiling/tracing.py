"""Where the time of a call goes, by operator family, and the most memory that it takes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastldm.profiling.device import synchronise
from fastldm.profiling.families import FAMILIES, family_of

WHOLE = "fastldm whole"
"""Name of the profiler's range around a call."""
_MICROSECOND = 1e-6


@dataclass(frozen=True)
class FamilyTimes:
    """Seconds of a call under the profiler.

    Attributes:
        by_family: of each operator family; "other" includes what passes between operators.
        whole: of the call, by one timestamp before and one after it.
    """

    by_family: dict[str, float]
    whole: float

    @property
    def accounted(self) -> float:
        """The families' sum as a share of the whole."""
        return sum(self.by_family.values()) / self.whole

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seconds_by_family": self.by_family,
            "seconds": self.whole,
            "accounted": self.accounted,
        }


def fastest_by_family(
    call: Callable[[], object], device: torch.device, budget: float
) -> FamilyTimes:
    """`time_by_family` of the fastest of as many calls as `budget` seconds allow, at most 5."""
    found = [time_by_family(call, device)]
    while sum(times.whole for times in found) + found[-1].whole < budget and len(found) < 5:
        found.append(time_by_family(call, device))
    return min(found, key=lambda times: times.whole)


def time_by_family(call: Callable[[], object], device: torch.device) -> FamilyTimes:
    """Profile one call.

    On a CPU an operator's time is what passes in it and not in others that it calls; on a GPU it
    is that of its kernels, and "other" includes what no kernel accounts for.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronise(device)
    with (
        _without_messages(),
        profile(activities=activities) as profiler,
        record_function(WHOLE),
    ):
        call()
        synchronise(device)
    if device.type == "cuda":
        return _of_kernels(profiler)
    return of_operators(profiler.profiler.kineto_results.events())


def of_operators(events: Sequence[Any]) -> FamilyTimes:
    """From the profiler's own records, whose nesting is that of the calls.

    ``profiler.events()`` would make a tree of Python objects of them, in most of a second for a
    training step.
    """
    root = next(event for event in events if event.name() == WHOLE)
    whole, thread = root.duration_ns(), root.start_thread_id()
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in events
        if event.start_thread_id() == thread and event.name() != WHOLE
    ]
    nanoseconds: Counter[str] = Counter({"other": whole})
    around = [(root.start_ns() + whole, "other")]
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start < root.start_ns() or start >= around[0][0]:
            continue
        while start >= around[-1][0]:
            around.pop()
        outer = around[-1][1]
        # What an operator without a family takes is that of the nearest that it serves.
        family = family_of(name) or outer
        nanoseconds[family] += end - start
        nanoseconds[outer] -= end - start
        around.append((end, family))
    seconds = {family: 1e-9 * taken for family, taken in nanoseconds.items()}
    return _family_times(seconds, 1e-9 * whole)


def _of_kernels(profiler: Any) -> FamilyTimes:
    events = [event for event in profiler.events() if event.device_type.name == "CPU"]
    root = next(event for event in events if event.name == WHOLE)
    whole = root.cpu_time_total * _MICROSECOND
    seconds: Counter[str] = Counter()
    for event in events:
        seconds[_family(event)] += event.self_device_time_total * _MICROSECOND
    seconds["other"] += max(whole - seconds.total(), 0.0)
    return _family_times(seconds, whole)


def _family_times(seconds: Mapping[str, float], whole: float) -> FamilyTimes:
    return FamilyTimes({family: seconds.get(family, 0.0) for family in FAMILIES}, whole)


def _family(event: Any) -> str:
    """That of the operator, else of the nearest operator that it serves."""
    while event is not None:
        family = family_of(event.name)
        if family is not None:
            return family
        event = event.cpu_parent
    return "other"


def peak_memory(call: Callable[[], object], device: torch.device, held: int) -> int:
    """The most bytes of tensors at once in a call, `held` bytes of weights and inputs included.

    On a GPU the allocator says it; on a CPU allocations and frees are added up, in which what is
    held beforehand does not appear.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device))
    with (
        _without_messages(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        call()
    results = profiler.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


@contextmanager
def _without_messages() -> Iterator[None]:
    """Keep the profiler's library from writing of each start and stop into a progress bar.

    It writes to the file descriptor itself, where Python's redirection does not reach.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
