"""Which environment `make` installs into, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout, in a folder with a space in its name, of what `make setup` depends on."""
    folder = tmp_path / "my checkout"
    (folder / "csrc").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "setup.py"):
        (folder / name).touch()
    return folder


def _environment(folder: Path, python: str = "exit 0") -> Path:
    """A folder like a virtual environment's, with a script for a Python."""
    path = folder / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{python}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def _make(
    checkout: Path, *arguments: object, **environment: object
) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CONDA_", "MAKE", "MFLAGS")) and name != "VIRTUAL_ENV"
    }
    return subprocess.run(
        ["make", *map(str, arguments)],
        cwd=checkout,
        env={**inherited, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def _installs_into(checkout: Path, **environment: object) -> str:
    shown = _make(checkout, "-n", "setup", **environment)
    assert shown.returncode == 0, shown.stderr
    (last,) = [line for line in shown.stdout.splitlines() if line.endswith("-m fastldm.env")]
    return last.removesuffix("/bin/python -m fastldm.env")


def test_an_active_environment_is_used(checkout: Path, tmp_path: Path) -> None:
    virtual, conda = _environment(tmp_path / "virtual"), _environment(tmp_path / "conda")
    assert _installs_into(checkout) == ".venv"
    assert _installs_into(checkout, VIRTUAL_ENV=virtual) == str(virtual)
    assert _installs_into(checkout, CONDA_PREFIX=conda, CONDA_DEFAULT_ENV="ldm") == str(conda)
    assert _installs_into(checkout, CONDA_PREFIX=conda, VIRTUAL_ENV=virtual) == str(virtual)


def test_condas_base_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    conda = _environment(tmp_path / "conda")
    assert _installs_into(checkout, CONDA_PREFIX=conda, CONDA_DEFAULT_ENV="base") == ".venv"


def test_an_environment_without_python_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "precious").touch()
    for name in ("CONDA_PREFIX", "VIRTUAL_ENV"):
        assert _installs_into(checkout, **{name: tools}) == ".venv"
        shown = _make(checkout, "setup", "PYTHON=false", **{name: tools, "PATH": "/usr/bin:/bin"})
        assert "fastldm needs Python 3.11 or newer as 'false'" in shown.stderr
    assert (tools / "precious").exists()


def test_an_environment_of_an_older_python_is_refused_before_anything_is_installed(
    checkout: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    old = _environment(tmp_path / "old", f'echo "$@" >> "{log}"; exit 1')
    shown = _make(checkout, "setup", VIRTUAL_ENV=old)
    assert shown.returncode != 0
    assert f"fastldm needs Python 3.11 or newer, and {old}/bin/python is older" in shown.stderr
    assert "install" not in log.read_text()
