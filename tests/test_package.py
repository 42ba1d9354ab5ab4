"""The house rules that tools can hold: style, types, layers, lazy names, no foreign paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastldm

ROOT = Path(__file__).resolve().parent.parent


def _tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        ["-c", "import importlinter.cli; importlinter.cli.lint_imports_command([])"],
    ],
    ids=["ruff-check", "ruff-format", "mypy", "import-linter"],
)
def test_static_checks(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_public_name_loads() -> None:
    for name in fastldm.__all__:
        assert getattr(fastldm, name) is not None
    assert set(fastldm.__all__) <= set(dir(fastldm))
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = fastldm.Unknown


def test_import_is_light() -> None:
    """Importing starts no CUDA context and loads neither Triton nor an optional package."""
    code = (
        "import sys, fastldm; import torch;"
        "heavy = {'triton', 'fastldm._C', 'datasets', 'accelerate', 'transformers', 'tokenizers',"
        " 'lpips', 'jsonargparse', 'matplotlib', 'diffusers', 'PIL'};"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["[]", "False"]


def test_no_file_is_longer_than_the_house_allows() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in _tracked_files()
        if path.suffix == ".py"
        and path.is_relative_to(ROOT / "fastldm")
        and (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_nothing_names_a_foreign_path() -> None:
    pattern = re.compile(r"/(?:root|home|work|opt/wheels|tmp/w)/")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:80]}"
        for path in _tracked_files()
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".cpp", ".h", ".cu", ".json", ""}
        and path != Path(__file__)
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        if pattern.search(line)
    ]
    assert not found
