"""The fixture that times contestants, and the table of what it found.

Run with ``pytest benchmarks`` (``make bench``). A benchmark checks its results before they are
timed. The table at the end gives each contestant's median time, and its ratio to the first one's;
``--benchmark-json`` keeps the same figures under ``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.timing import Contestants, Race, interleaved_medians, repeats_of

_results = pytest.StashKey[list[tuple[str, dict[str, float]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = []


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Race:
    """Times contestants in turns; pytest-benchmark's own table shows the first of them."""

    def run(contestants: Contestants) -> dict[str, float]:
        medians = interleaved_medians(contestants)
        benchmark.extra_info.update(medians)
        first = next(iter(contestants.values()))
        benchmark.pedantic(first, rounds=5, iterations=repeats_of(first))
        request.config.stash[_results].append((request.node.name, medians))
        return medians

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.stash[_results]:
        return
    terminalreporter.section("median times, and their ratio to the first")
    for test, medians in config.stash[_results]:
        first = next(iter(medians.values()))
        terminalreporter.write_line(test)
        for name, seconds in medians.items():
            terminalreporter.write_line(
                f"  {name:<28}{seconds * 1e6:>12.1f} us{seconds / first:>9.2f}"
            )
