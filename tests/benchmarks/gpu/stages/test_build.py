"""A build that fails is told, also where setup.py goes on without the extension."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.gpu.stages import Context, build

_GOOD = "import os; print(os.environ['TORCH_CUDA_ARCH_LIST'], os.environ['FASTLDM_BUILD'])"


@pytest.mark.parametrize(
    ("setup", "check", "problem"),
    [
        (_GOOD, "", None),
        ("raise SystemExit(2)", "", "the build ended by 2"),
        ("print('fastldm: the extension is not built, …')", "", "the build ended by 0"),
        (_GOOD, "assert False", "what was built cannot be used"),
        ("import time; time.sleep(600)", "", "the build ended by -"),
    ],
)
def test_build(
    setup: str, check: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.py").write_text(setup, encoding="utf-8")
    monkeypatch.setattr(build, "_CHECK", check)
    row = build.build(tmp_path, tmp_path / "log", 33.0, "9.0")
    assert row["jobs"] == len(os.sched_getaffinity(0))
    if problem is None:
        assert "problem" not in row
        assert (tmp_path / "log").read_text() == "9.0 cuda\n"
    else:
        assert row["problem"].startswith(problem)


def test_setup_says_so() -> None:
    text = (build.ROOT / "setup.py").read_text(encoding="utf-8")
    assert build._NOT_BUILT in text


def test_a_dry_run_builds_nothing(tmp_path: Path) -> None:
    (row,) = build.run(Context("cpu", tmp_path, 60))
    assert "skipped" in row
