"""Stages run one after another, whatever becomes of each, and none is skipped silently."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import records, runner
from benchmarks.gpu.records import DONE, FAILED, SKIPPED, STOPPED, Record
from benchmarks.gpu.runner import run_stages
from benchmarks.gpu.stages import Stage

STAGES = [Stage("hangs", 4.0), Stage("crashes", 60.0), Stage("ends", 60.0)]
# It stores as a stage's process does, without waiting for torch to be imported.
_WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.records import Record, sources_digest
name, out, device, limit = sys.argv[1], Path(sys.argv[3]), sys.argv[5], float(sys.argv[7])
stamp = {"on": device, "sources": sources_digest(), "date": "a day"}
record = Record(name, stamp=stamp, rows=[{"limit": limit}])
record.write(out)
print(name, "speaks", flush=True)
if name == "hangs":
    time.sleep(600)
if name == "crashes":
    os.abort()
record.state = "done"
record.write(out)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str | Path]:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    return [sys.executable, script]


def _run(out: Path, worker: list[str | Path], **options: Any) -> dict[str, tuple[Record, str]]:
    given: dict[str, Any] = {"limits": {}, "total": 600.0, "again": False, **options}
    found = run_stages(STAGES, out, "cpu", worker=worker, **given)
    return {record.stage: (record, line) for record, line in found}


def test_each_stage_ends_as_it_may(
    tmp_path: Path, worker: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_LEAST", 1.0)
    found = _run(tmp_path, worker)
    states = {name: record.state for name, (record, _) in found.items()}
    assert states == {"hangs": STOPPED, "crashes": FAILED, "ends": DONE}
    hung, crashed = found["hangs"][0], found["crashes"][0]
    # What it had found by then is kept.
    assert hung.rows == [{"limit": 4.0}]
    assert hung.problems == ["stopped at its limit of 4 s with 1 rows"]
    assert "exit status -6" in crashed.reason
    assert (tmp_path / "crashes.txt").read_text() == "crashes speaks\n"
    for name, (record, _) in found.items():
        assert records.read(tmp_path, name) == record


def test_what_is_done_is_kept_until_the_sources_change(
    tmp_path: Path, worker: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"total": 600.0, "limits": {"hangs": 0.0, "crashes": 0.0}}
    _run(tmp_path, worker, **only)
    assert "kept: it was done on a day" in _run(tmp_path, worker, **only)["ends"][1]
    assert "done in" in _run(tmp_path, worker, **only, again=True)["ends"][1]
    monkeypatch.setattr(records, "sources_digest", lambda: "others")
    assert "done in" in _run(tmp_path, worker, **only)["ends"][1]


def test_a_stage_without_time_says_so(tmp_path: Path, worker: list[str | Path]) -> None:
    record, line = _run(tmp_path, worker, total=1.0)["ends"]
    assert line == "not run: no time was left of 1 s"
    assert (record.state, record.reason) == (SKIPPED, "no time was left of 1 s")
    # A result that is there is not given up for it.
    _run(tmp_path, worker, limits={"hangs": 0.0, "crashes": 0.0})
    record, line = _run(tmp_path, worker, total=1.0, again=True)["ends"]
    assert (record.state, line) == (DONE, "not run: no time was left of 1 s")


def test_limits_are_given_on_and_cut_to_the_time_left(
    tmp_path: Path, worker: list[str | Path]
) -> None:
    limits = {"hangs": 0.0, "crashes": 0.0, "ends": 40.0}
    assert _run(tmp_path, worker, limits=limits)["ends"][0].rows == [{"limit": 40.0}]
    (row,) = _run(tmp_path, worker, limits=limits, total=30.0, again=True)["ends"][0].rows
    assert 5 < row["limit"] <= 30


def test_a_record_is_whole_at_every_moment(tmp_path: Path) -> None:
    record = Record("a stage", rows=[{"case": "é", "problem": "wrong"}])
    record.write(tmp_path)
    assert json.loads((tmp_path / "a stage.json").read_text())["rows"] == record.rows
    assert record.problems == ["wrong"]
    assert [path.name for path in tmp_path.iterdir()] == ["a stage.json"]
