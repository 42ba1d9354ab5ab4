"""Builds the extension, CUDA sources included, for the device of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.records import ROOT, Row
from benchmarks.gpu.stages import Context

_NOT_BUILT = "the extension is not built"
"""What setup.py says where the compiler fails, which does not end an installation."""
_CHECK = """
import torch
from fastldm.ops import _extension
problem = _extension.problem() or _extension.cuda_problem(torch.device("cuda"))
assert problem is None, problem
"""


def run(context: Context) -> Iterator[Row]:
    if context.is_dry:
        yield {"what": "extension", "skipped": "a dry run leaves the installed extension as it is"}
        return
    major, minor = torch.cuda.get_device_capability()
    yield build(ROOT, context.out / "build.log", context.limit, f"{major}.{minor}")


def build(root: Path, log: Path, limit: float, architecture: str) -> Row:
    """Build in `root`, and load what was built."""
    log.unlink(missing_ok=True)
    processors = len(os.sched_getaffinity(0))
    environment = {
        "FASTLDM_BUILD": "cuda",
        "MAX_JOBS": str(processors),
        "TORCH_CUDA_ARCH_LIST": architecture,
    }
    outcome = run_limited(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        limit - 30,
        log,
        cwd=root,
        environment=environment,
    )
    row: Row = {
        "what": "extension", "architecture": architecture, "jobs": processors,
        "seconds": round(outcome.seconds, 1),
    }  # fmt: skip
    if outcome.stopped or outcome.status or _NOT_BUILT in log.read_text(encoding="utf-8"):
        return {**row, "problem": f"the build ended by {outcome.status}; see {log}"}
    check = run_limited([sys.executable, "-c", _CHECK], 30, log, cwd=root)
    if check.status:
        return {**row, "problem": f"what was built cannot be used; see {log}"}
    return row
