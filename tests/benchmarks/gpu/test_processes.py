"""A command that outlasts its limit is ended with all that it started."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import processes
from benchmarks.gpu.processes import run_limited

# A process that starts another one and notes its id.
_PARENT = """
import signal, subprocess, sys, time
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
print("started", flush=True)
time.sleep(600)
"""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["willing", "deaf"])
def test_a_hanging_command_and_its_children_are_ended(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    note, log = tmp_path / "pid", tmp_path / "log"
    outcome = run_limited([sys.executable, "-c", _PARENT, note, kind], 2.0, log)
    assert outcome.stopped
    assert outcome.status < 0
    assert outcome.seconds < 30
    child = int(note.read_text())
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)
    assert log.read_text() == "started\n"


def test_status_output_folder_and_environment(tmp_path: Path) -> None:
    program = "import os, sys; print(os.getcwd(), os.environ['KEY'], 'é'); sys.exit(3)"
    log = tmp_path / "log"
    log.write_text("before\n")
    outcome = run_limited(
        [sys.executable, "-c", program], 60, log, cwd=tmp_path, environment={"KEY": "value"}
    )
    assert (outcome.status, outcome.stopped) == (3, False)
    assert log.read_text(encoding="utf-8") == f"before\n{os.path.realpath(tmp_path)} value é\n"
