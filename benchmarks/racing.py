"""A race of contestants as benchmarks of pytest-benchmark's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.disturbance import watched
from benchmarks.memory import peak_bytes
from benchmarks.timing import Contestants, Times, interleaved


@dataclass(frozen=True)
class Measured:
    """What a race found, of each contestant."""

    times: dict[str, Times] = field(default_factory=dict)
    """Of all runs together."""
    ratios: dict[str, list[float]] = field(default_factory=dict)
    """Median time over the first contestant's, in each run."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """See `benchmarks.memory.peak_bytes`."""
    disturbance: float | None = None
    """See `benchmarks.disturbance`."""


def run_race(
    benchmark: Any, contestants: Contestants, rounds: int, runs: int, device: str
) -> Measured:
    """Time contestants by turns, by the timer of the `benchmark` fixture, and hand it each.

    Args:
        benchmark: pytest-benchmark's fixture, not used before.
        contestants: the first is the one that others are held against.
        rounds: turns of each contestant in a run.
        runs: how often all of it is repeated, for the spread of the ratios.
        device: whose memory counts, "cpu" or "cuda".

    Returns:
        Nothing measured where benchmarks are disabled: then each is called once.
    """
    benchmark._mode = "race"
    if not benchmark.enabled:
        for call in contestants.values():
            call()
        return Measured()
    with watched() as disturbance:
        found = [interleaved(contestants, rounds, benchmark._timer) for _ in range(runs)]
    peaks = {name: peak_bytes(call, device) for name, call in contestants.items()}
    times, ratios = {}, {}
    for name in contestants:
        times[name] = Times(
            found[0][name].calls, [turn for run in found for turn in run[name].turns]
        )
        first = next(iter(contestants))
        ratios[name] = [run[name].quartiles.median / run[first].quartiles.median for run in found]
    _hand_over(benchmark, times, ratios, peaks)
    return Measured(times, ratios, peaks, disturbance.share)


def _hand_over(
    benchmark: Any,
    times: dict[str, Times],
    ratios: dict[str, list[float]],
    peaks: dict[str, int],
) -> None:
    """One benchmark a contestant; pytest-benchmark has no public way to add more than one."""
    name, fullname, params = benchmark.name, benchmark.fullname, benchmark.params
    group = benchmark.group or fullname.rpartition("/")[2]
    for contestant, measured in times.items():
        benchmark.name = _with_contestant(name, contestant)
        benchmark.fullname = _with_contestant(fullname, contestant)
        benchmark.group = group
        benchmark.params = {**(params or {}), "contestant": contestant}
        benchmark.param = contestant
        benchmark.extra_info = {
            "peak_bytes": peaks[contestant], "ratio_to_first": ratios[contestant]
        }  # fmt: skip
        stats = benchmark._make_stats(measured.calls)
        for seconds in measured.turns:
            stats.update(seconds * measured.calls)


def _with_contestant(name: str, contestant: str) -> str:
    """As pytest writes one parameter more."""
    return f"{name[:-1]}-{contestant}]" if name.endswith("]") else f"{name}[{contestant}]"
