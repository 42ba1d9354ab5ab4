"""Runs the stages one after another, whatever becomes of each."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu import records
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.records import DONE, FAILED, ROOT, SKIPPED, STOPPED, Record
from benchmarks.gpu.stages import Stage

_LEAST = 5.0
"""Seconds that are worth starting a stage for."""


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    device: str,
    *,
    limits: Mapping[str, float],
    total: float,
    again: bool,
    worker: Sequence[str | Path] = (sys.executable, "-m", "benchmarks.gpu.worker"),
) -> Iterator[tuple[Record, str]]:
    """Each stage's record as it ends, and a line on what was done."""
    end = time.monotonic() + total
    sources = records.sources_digest()
    for stage in stages:
        earlier = records.read(out, stage.name)
        if earlier and not again and _stands(earlier, sources, device):
            yield earlier, f"kept: it was done on {earlier.stamp['date']}; --again repeats it"
            continue
        left = end - time.monotonic()
        if left < _LEAST:
            reason = f"no time was left of {total:g} s"
            if earlier is None or not earlier.rows:
                earlier = Record(stage.name, SKIPPED, reason, stamp={"date": records.now()})
                earlier.write(out)
            yield earlier, f"not run: {reason}"
            continue
        limit = min(limits.get(stage.name, stage.limit), left)
        record = _run(stage, out, device, limit, worker)
        yield record, f"{record.state} in {record.seconds:.1f} s"


def _stands(record: Record, sources: str, device: str) -> bool:
    """Whether a result is that of these sources on such a device."""
    stamp = record.stamp
    return record.state == DONE and stamp["sources"] == sources and stamp["on"] == device


def _run(
    stage: Stage, out: Path, device: str, limit: float, worker: Sequence[str | Path]
) -> Record:
    started = Record(stage.name, stamp={"date": records.now()})
    started.write(out)
    log = out / f"{stage.name}.txt"
    log.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    outcome = run_limited(
        [*worker, stage.name, "--out", out, "--device", device, "--limit", f"{limit:g}"],
        limit,
        log,
        cwd=ROOT,
        environment={"PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
    )
    record = records.read(out, stage.name) or started
    record.seconds = outcome.seconds
    if outcome.stopped:
        record.state = STOPPED
        record.reason = f"stopped at its limit of {limit:g} s with {len(record.rows)} rows"
    elif record.state == records.RUNNING:
        record.state, record.reason = FAILED, f"ended by exit status {outcome.status}; see {log}"
    record.write(out)
    return record
