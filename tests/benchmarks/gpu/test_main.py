"""The command: stages by name, limits, exit status, table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.records import ROOT
from benchmarks.gpu.stages import NAMES


def _call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_stage_from_the_command_line(tmp_path: Path) -> None:
    stages = ("--device", "cpu", "--stages", "build", "--out", tmp_path / "new")
    first = _call(*stages)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("build: done in ")
    assert "| build | done |" in first.stdout
    assert "| tuning | not run |" in first.stdout
    assert first.stdout.endswith((tmp_path / "new" / "table.md").read_text(encoding="utf-8"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "build.json", "build.txt", "table.md",
    ]  # fmt: skip


def test_a_stage_that_is_stopped_is_a_failure(tmp_path: Path) -> None:
    found = _call(
        "--device", "cpu", "--stages", "group_norm_silu", "--limit", "group_norm_silu=1",
        "--total", "60", "--out", tmp_path,
    )  # fmt: skip
    assert found.returncode == 1
    assert "stopped at its limit of 1 s" in found.stderr
    assert "| group_norm_silu | stopped |" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "roofs,nothing"], "no stage nothing"),
        (["--limit", "nothing=5"], "no stage 'nothing'"),
        ([], "there is no CUDA device; --device cpu is a dry run"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_every_stage_has_a_module() -> None:
    folder = ROOT / "benchmarks" / "gpu" / "stages"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(NAMES)
