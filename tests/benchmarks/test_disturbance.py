"""The share of others, against processor times that a test writes down."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import disturbance
from benchmarks.disturbance import watched


def test_others_are_all_that_is_busy_but_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    own, wall = iter([1.0, 3.0]), iter([10.0, 20.0])
    monkeypatch.setattr(disturbance, "_STAT", stat)
    monkeypatch.setattr(disturbance.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(disturbance.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(disturbance.time, "process_time", lambda: next(own))
    monkeypatch.setattr(disturbance.time, "perf_counter", lambda: next(wall))
    stat.write_text("cpu  100 0 100 9000 5 0 0 0 0 0\ncpu0 1 1\n")
    with watched() as found:
        stat.write_text("cpu  400 100 150 9900 9 10 20 120 0 0\ncpu0 1 1\n")
    # 6 s were busy, 2 s of them here, of 20 s.
    assert found.share == pytest.approx(0.2)


def test_where_linux_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance, "_STAT", tmp_path / "missing")
    with watched() as found:
        pass
    assert found.share is None
