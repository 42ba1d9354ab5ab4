"""What the stages found: one JSON file a stage, whole at every moment, and where it was found."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("benchmarks", "csrc", "fastldm", "tests")

Row = dict[str, Any]
Stamp = dict[str, str | None]

RUNNING, DONE, FAILED, STOPPED, SKIPPED = "running", "done", "failed", "stopped", "skipped"


@dataclass
class Record:
    """One stage's result."""

    stage: str
    state: str = RUNNING
    """One of running, done, failed (an exception or a crash), stopped (at its limit), skipped."""
    reason: str = ""
    """Why it is not done."""
    seconds: float = 0.0
    stamp: Stamp = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What is wrong: with the stage itself, or with something that it tested."""
        found = [str(row["problem"]) for row in self.rows if row.get("problem")]
        return [self.reason, *found] if self.state in (FAILED, STOPPED) else found

    def write(self, folder: Path) -> None:
        """In one step, so that whoever ends the process leaves the last version whole."""
        path = _path(folder, self.stage)
        new = path.with_suffix(".json.new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        new.replace(path)


def read(folder: Path, stage: str) -> Record | None:
    """The record of a stage; None where there is none."""
    path = _path(folder, stage)
    return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _path(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.json"


def sources_digest(root: Path = ROOT) -> str:
    """Of all that a result depends on, for a copy without its git history and one with changes."""
    digest = hashlib.sha256()
    files = (path for name in SOURCES for path in sorted((root / name).rglob("*")))
    for path in files:
        if path.suffix in (".py", ".json", ".cpp", ".cu", ".h") and path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit(root: Path = ROOT) -> str | None:
    """The checked-out commit, with a + where files differ; FASTLDM_COMMIT where there is no git."""
    given = os.environ.get("FASTLDM_COMMIT")
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return given
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changes else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def now() -> str:
    """Date and time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
