"""docs/performance.md is what the result files make of it, and says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import performance_page
from benchmarks.gpu.records import DONE, Record
from benchmarks.performance_page import GPU, page

STAMP = {
    "device": "A processor", "cores": 2, "faiss-cpu": None, "torch": "2.11", "commit": "abc",
    "date": "a day",
}  # fmt: skip


def _times(**microseconds: float) -> dict[str, Any]:
    return {
        name: {"lower": value, "median": value, "upper": value, "peak_bytes": 2**20}
        for name, value in microseconds.items()
    }


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_the_committed_page_is_up_to_date() -> None:
    assert performance_page.main(["--check"]) == 0


def test_another_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(performance_page, "PAGE", tmp_path / "performance.md")
    assert performance_page.main(["--check"]) == 1
    assert "is not what benchmarks/results makes of it" in capsys.readouterr().err
    assert performance_page.main([]) == 0
    assert performance_page.main(["--check"]) == 0


def test_times_ratios_spreads_and_where_we_lose(tmp_path: Path) -> None:
    node = "benchmarks/test_norm.py::test_forward[small]"
    lost = "benchmarks/test_norm.py::test_forward[large]"
    runs = "benchmarks/test_latent.py::test_step[128]"
    _write(
        tmp_path / "a-processor",
        "norm.json",
        {
            "stamp": STAMP,
            "benchmarks": {
                node: _times(fastldm=10.0, copy=5.0, eager=25.0),
                lost: _times(fastldm=2000.0, copy=5.0, eager=1500.0),
                runs: {**_times(**{"f=4": 10.0}), **_times(**{"f=1": 80.0})},
            },
            "ratios": {runs: {"f=4": [1.0] * 3, "f=1": [7.0, 9.0, 8.0]}},
            "disturbance": {node: 0.01, lost: 0.02, runs: 0.1},
        },
    )
    found = page(tmp_path)
    assert "## A processor" in found
    assert "`a-processor/norm.json`: cores 2, torch 2.11, commit abc, date a day." in found
    assert "**norm: forward**" in found
    assert "| small | 10.0 µs | 5.0 µs (0.50) | 25.0 µs (2.50) | 1 / 1 / 1 |" in found
    assert "| large | 2.00 ms | 5.0 µs (0.00) | 1.50 ms (0.75) | 1 / 1 / 1 |" in found
    assert "- 128: f=1 takes 8.00 times as long as f=4 (7.00 to 9.00 in 3 runs)" in found
    assert "| norm: forward | eager 1.37 (0.75 to 2.50) |" in found
    losses = [line for line in found.splitlines() if "of our time" in line]
    assert losses == ["- norm: forward, large: eager takes 0.75 of our time"]
    assert "No GPU has been measured" in found


def test_nothing_lost(tmp_path: Path) -> None:
    node = "benchmarks/test_norm.py::test_forward[small]"
    content = {
        "stamp": STAMP, "benchmarks": {node: _times(fastldm=1.0, eager=2.0)}, "ratios": {},
        "disturbance": {},
    }  # fmt: skip
    _write(tmp_path / "a-processor", "norm.json", content)
    found = page(tmp_path)
    assert "In none of 1 races was another faster than fastldm." in found
    assert "Left out" not in found


def test_what_is_compiled_is_held_against_ours_compiled_too(tmp_path: Path) -> None:
    eager, compiled = (f"benchmarks/test_unets.py::test_step[{name}]" for name in ("a", "b"))
    times = {
        eager: _times(fastldm=2.0, eager=4.0),
        compiled: _times(**{"fastldm": 2.0, "fastldm compiled": 1.0, "torch.compile": 1.5}),
    }
    for name, node in (("unets.json", eager), ("unets_compiled.json", compiled)):
        content = {
            "stamp": STAMP, "benchmarks": {node: times[node]}, "ratios": {}, "disturbance": {}
        }  # fmt: skip
        _write(tmp_path / "a-processor", name, content)
    found = page(tmp_path)
    row = (
        "| unets: step | eager 2.00, torch.compile 0.75, torch.compile (ours compiled, too) 1.50 |"
    )
    assert row in found
    losses = [line for line in found.splitlines() if "of our time" in line]
    assert losses == ["- unets: step, b: torch.compile takes 0.75 of our time"]


def test_what_others_disturbed_is_left_out(tmp_path: Path) -> None:
    quiet, loud = (f"benchmarks/test_norm.py::test_forward[{name}]" for name in ("quiet", "loud"))
    content = {
        "stamp": STAMP, "ratios": {}, "disturbance": {quiet: 0.1, loud: 0.11},
        "benchmarks": {name: _times(fastldm=2.0, eager=1.0) for name in (quiet, loud)},
    }  # fmt: skip
    _write(tmp_path / "a-processor", "norm.json", content)
    found = page(tmp_path)
    assert "Left out: 1 during which other programs had more than 10%" in found
    assert "| quiet |" in found
    assert "loud" not in found


def test_records_of_a_gpu(tmp_path: Path) -> None:
    stamp = {
        "on": "cuda", "device": "A GPU", "driver": "580", "torch": "2.11", "triton": "3.6",
        "cuda": "13.0", "commit": "abc", "sources": "def", "date": "a day",
    }  # fmt: skip
    folder = tmp_path / "a-gpu" / GPU
    folder.mkdir(parents=True)
    rows = [{"what": "copy", "bytes": 2**30, "bytes_per_second": 4e12}]
    Record("roofs", DONE, stamp=stamp, rows=rows).write(folder)
    found = page(tmp_path)
    assert "device A GPU, driver 580, torch 2.11" in found
    assert "4000.0 GB/s read and written" in found
    assert "No GPU has been measured" not in found

    Record("roofs", DONE, stamp={**stamp, "on": "cpu"}, rows=rows).write(folder)
    with pytest.raises(ValueError, match="a dry run"):
        page(tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a-processor", "norm.json", {"machine_info": {}})
    with pytest.raises(ValueError, match=r"norm\.json: no file of"):
        page(tmp_path)
