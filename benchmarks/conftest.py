"""The fixture that times contestants, the table of what it found, and the file that keeps it.

Run with ``pytest benchmarks`` (``make bench``). A benchmark checks its results before they are
timed. The table at the end gives each contestant's median time, and its ratio to the first one's.
``--results FILE`` writes the quartiles as JSON, with processor, versions and commit, as the files
under benchmarks/results/ hold them; ``--benchmark-json`` has the medians under ``extra_info``.
Freed memory stays in the process, so that no contestant waits for fresh pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory, results
from benchmarks.timing import ROUNDS, Contestants, Quartiles, Race, interleaved, repeats_of

_measured = pytest.StashKey[dict[str, dict[str, Quartiles]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="JSON file for the times of all contestants")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_measured] = {}
    memory.keep_freed_memory()


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Race:
    """Times contestants in turns; pytest-benchmark's own table shows the first of them."""

    def run(contestants: Contestants, rounds: int = ROUNDS) -> dict[str, Quartiles]:
        found = interleaved(contestants, rounds)
        benchmark.extra_info.update({name: times.median for name, times in found.items()})
        first = next(iter(contestants.values()))
        benchmark.pedantic(first, rounds=5, iterations=repeats_of(first))
        request.config.stash[_measured][request.node.nodeid] = found
        return found

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--results")
    if path is not None and session.config.stash[_measured]:
        results.write(path, session.config.stash[_measured])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.stash[_measured]:
        return
    terminalreporter.section("median times, and their ratio to the first")
    for test, found in config.stash[_measured].items():
        first = next(iter(found.values())).median
        terminalreporter.write_line(test)
        for name, times in found.items():
            terminalreporter.write_line(
                f"  {name:<28}{times.median * 1e6:>12.1f} us{times.median / first:>9.2f}"
            )
