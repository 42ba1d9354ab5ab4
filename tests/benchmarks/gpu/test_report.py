"""The table says what was measured, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.contest import COPY, OURS
from benchmarks.gpu.records import DONE, FAILED, SKIPPED, STOPPED, Record, Row, Stamp
from benchmarks.gpu.report import TARGETS, verdict

STAMP: Stamp = {
    "on": "cuda", "device": "A GPU", "capability": "9.0", "driver": "580", "torch": "2.11",
    "triton": "3.6", "cuda": "13.0", "commit": "abc", "sources": "def", "date": "a day",
}  # fmt: skip
NORM = TARGETS[0]


def _row(ours: float | None, peer: float | None, name: str = COPY, **more: Any) -> Row:
    times = {key: value for key, value in ((OURS, ours), (name, peer)) if value is not None}
    return {
        "case": f"case {ours}", "bytes": 1000, "flops": 0.0, "rate": None, "is_target": True,
        "cold_us": times, "warm_us": times, "how": dict.fromkeys(times, "graph"), "left_out": {},
        **more,
    }  # fmt: skip


def _record(*rows: Row, stage: str = NORM.stage, state: str = DONE, **stamp: str) -> Record:
    return Record(stage, state, seconds=1.0, stamp={**STAMP, **stamp}, rows=list(rows))


def test_met_and_not_met() -> None:
    good, bad = _row(10.0, 8.5), _row(10.0, 8.4)
    assert verdict(NORM, _record(good, good)) == ("met", "2 of 2", "0.85 at case 10.0")
    assert verdict(NORM, _record(good, bad)) == ("**not met**", "1 of 2", "0.84 at case 10.0")


def test_a_target_is_met_by_its_own_cases_alone() -> None:
    other = _row(10.0, 1.0, is_target=False)
    assert verdict(NORM, _record(_row(10.0, 9.0), other))[0] == "met"
    assert verdict(NORM, _record(other))[0] != "met"


def test_what_was_not_measured_is_not_met() -> None:
    good = _row(10.0, 9.0)
    assert verdict(NORM, None) == ("not run", "", "")
    assert verdict(NORM, _record(good, on="cpu")) == ("not run", "", "")
    assert verdict(NORM, _record()) == ("not run to its end (done)", "0 of 0", "")
    for state in (STOPPED, FAILED, SKIPPED):
        assert verdict(NORM, _record(good, state=state))[0] == f"not run to its end ({state})"
    # A case without the peer's time, and one whose result was wrong.
    assert verdict(NORM, _record(good, _row(10.0, None)))[0] == "not run to its end (done)"
    assert verdict(NORM, _record(good, _row(None, 9.0, problem="wrong")))[0] == "**not met**"
    assert verdict(NORM, _record(_row(10.0, 1.0), state=STOPPED))[0] == "**not met**"


def test_an_empty_folder(tmp_path: Path) -> None:
    page = report.page(tmp_path)
    assert page.startswith("# Dry run: no GPU was measured")
    assert page.count("| not run |") == len(TARGETS) + len(report.STAGES)


def test_page_of_a_gpu(tmp_path: Path) -> None:
    copy = {"what": "copy", "bytes": 2**33, "bytes_per_second": 4e12}
    small = {"what": "copy", "bytes": 2**20, "bytes_per_second": 9e12}
    product = {
        "what": "matrix product", "dtype": "float32", "side": 64, "flops_per_second": 5e13,
    }  # fmt: skip
    _record(copy, small, product, stage="roofs").write(tmp_path)
    norm = _row(2.0, 1.9, bytes=4_000_000, left_out={"peer": "a | b"})
    norm["how"][OURS] = "calls"
    _record(norm).write(tmp_path)
    lookup = _row(4.0, 100.0, "cdist + argmin", bytes=1000, flops=1e8, rate="float32")
    _record(lookup, stage="vector_quantize").write(tmp_path)
    _record(
        {"what": "memcheck", "skipped": "no tool"}, {"what": "a", "problem": "3 errors"},
        stage="sanitizer", commit="other",
    ).write(tmp_path)  # fmt: skip
    page = report.page(tmp_path)
    assert page.startswith("# Measured on a GPU")
    assert "| met | 1 of 1 | 0.95 at case 2.0 |" in page
    assert "| case 2.0 | 2.00 (2.00)† | 1.90 (1.90) | 0.95 | 0.50 |" in page
    # The matrix rate is the higher floor: 1e8 / 5e13 s of 4 µs.
    assert "| case 4.0 | 4.00 (4.00) | 100.00 (100.00) | 25.00 | 0.50 |" in page
    assert "- peer: a \\| b" in page
    assert "| sanitizer | done | 1.0 | a day | 3 errors | no tool |" in page
    assert "commit abc, sources def (roofs, group_norm_silu, vector_quantize)" in page
    assert "commit other, sources def (sanitizer)" in page


def test_no_roof_without_a_large_copy(tmp_path: Path) -> None:
    _record({"what": "copy", "bytes": 2**20, "bytes_per_second": 9e12}, stage="roofs").write(
        tmp_path
    )
    _record(_row(2.0, 1.9)).write(tmp_path)
    assert "| 0.95 | – |" in report.page(tmp_path)


def test_a_dry_run_is_called_one(tmp_path: Path) -> None:
    _record(_row(10.0, 9.0)).write(tmp_path)
    _record(stage="roofs", on="cpu").write(tmp_path)
    assert report.page(tmp_path).startswith("# Dry run")


def test_models(tmp_path: Path) -> None:
    row = {
        "what": "UNet", "layout": "channels_last", "backend": "fastldm", "ms": 1.25, "how": "graph",
        "families_us": {"convolution": 700.0, "other": 20.0},
    }  # fmt: skip
    plain = {**row, "backend": "plain torch", "families_us": {"convolution": 700.0}, "how": "calls"}
    _record(row, plain, stage="models").write(tmp_path)
    page = report.page(tmp_path)
    assert "| model | layout | backend | ms | convolution | other |" in page
    assert "| UNet | channels_last | fastldm | 1.250 | 700.0 | 20.0 |" in page
    assert "| UNet | channels_last | plain torch | 1.250† | 700.0 | 0.0 |" in page


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.stage)
def test_each_target_has_a_stage(target: Any) -> None:
    assert target.stage in {stage.name for stage in report.STAGES}
