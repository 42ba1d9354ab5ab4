"""What a result is stamped with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import records


def _git(folder: Path, *arguments: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_with_changes_and_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLDM_COMMIT", "given")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit(tmp_path) == "given"
    _git(tmp_path, "init")
    (tmp_path / "file").write_text("1")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-m", "first")
    clean = records.commit(tmp_path)
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert records.commit(tmp_path) == clean + "+"


def test_sources_digest(tmp_path: Path) -> None:
    kernel = tmp_path / "fastldm" / "ops" / "plan.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("{}")
    first = records.sources_digest(tmp_path)
    (tmp_path / "fastldm" / "_C.so").write_text("what is built is not a source")
    assert records.sources_digest(tmp_path) == first
    kernel.write_text("{ }")
    assert records.sources_digest(tmp_path) != first
