"""The fixture that times contestants, the tables of what it found, and the file that keeps it.

Run with ``pytest benchmarks``, or without those marked slow by ``make bench``. A benchmark checks
its results before they are timed. Contestants have their turns one after another, and each is a
benchmark of pytest-benchmark's, in the group of its test: so ``--benchmark-group-by=group`` (the
default) has a table for each size, ``--benchmark-group-by=param:contestant`` one for each
contestant, and ``--benchmark-autosave`` and ``--benchmark-compare`` know each again by its name.
The table at the end gives each contestant's median time, and its ratio to the first one's.
``--results FILE`` writes the quartiles as JSON, with processor, versions and commit, as the files
under benchmarks/results/ hold them. ``--device cuda`` runs the suites of models on a GPU, timed by
CUDA events. Freed memory stays in the process, so that no contestant waits for fresh pages.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory, results
from benchmarks.racing import Measured, run_race
from benchmarks.timing import ROUNDS, Contestants, Race, Times, timer_of

_measured = pytest.StashKey[dict[str, Measured]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="JSON file for the times of all contestants")
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the suites of models"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_measured] = {}
    memory.keep_freed_memory()
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    if device == "cpu":
        return
    timer = timer_of(device)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer))
        if "device" not in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="measures a CPU; see python -m benchmarks.gpu"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    stamp = results.stamp(config.getoption("--device"))
    # What changes from run to run on one machine is no difference between machines.
    for key in ("commit", "sources", "date"):
        del stamp[key]
    machine_info["fastldm"] = stamp


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where models are measured: "cpu" or "cuda"."""
    found: str = request.config.getoption("--device")
    return found


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Race:
    """Times contestants in turns, each a benchmark of its own."""

    def run(contestants: Contestants, rounds: int = ROUNDS, runs: int = 1) -> dict[str, Times]:
        device = request.config.getoption("--device")
        measured = run_race(benchmark, contestants, rounds, runs, device)
        if measured.times:
            request.config.stash[_measured][request.node.nodeid] = measured
        return measured.times

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--results")
    if path is not None and session.config.stash[_measured]:
        results.write(path, session.config.stash[_measured], session.config.getoption("--device"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.stash[_measured]:
        return
    terminalreporter.section("median times, and their ratio to the first")
    for test, measured in config.stash[_measured].items():
        terminalreporter.write_line(test)
        first = next(iter(measured.times.values())).quartiles.median
        for name, times in measured.times.items():
            median = times.quartiles.median
            line = f"  {name:<28}{median * 1e6:>12.1f} us{median / first:>9.2f}"
            ratios = measured.ratios.get(name, [])
            if len(ratios) > 1:
                line += (
                    f"  ({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} runs, "
                    f"median {statistics.median(ratios):.2f})"
                )
            terminalreporter.write_line(line)
