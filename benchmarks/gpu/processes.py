"""A command under a time limit, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_GRACE = 5.0
"""Seconds that a process has between being asked to end and being killed."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    """Its exit status; negative: the signal that ended it."""
    stopped: bool
    """It ran past its limit."""
    seconds: float


def run_limited(
    command: Sequence[str | Path],
    limit: float,
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `command`, its output appended to `log`, and end its processes after `limit` seconds.

    They are also ended if this process is interrupted while it waits. `environment` is added to
    that of this process.
    """
    start = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stopped = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            _end_group(process)
    return Outcome(process.returncode, stopped, time.monotonic() - start)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, so that it ends commands of its own; then kill what is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
