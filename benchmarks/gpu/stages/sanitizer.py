"""compute-sanitizer's four tools on a program that launches every kernel."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu import every_kernel
from benchmarks.gpu.kernels import all_kernels
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.records import ROOT, Row
from benchmarks.gpu.stages import Context

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_ERROR_STATUS = 99
# A block of each tensor's own, so that its end is the end of an allocation.
_NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_MOST_LINES = 30


def run(context: Context) -> Iterator[Row]:
    program = [sys.executable, "-m", "benchmarks.gpu.every_kernel", "--device", context.device]
    # Alone first: it compiles the kernels, and an error of its own is not the tools'.
    alone = _watched("program alone", program, context.limit / 3, context.out)
    yield alone
    if "problem" in alone:
        return
    missing = "compute-sanitizer is not on the PATH"
    found = shutil.which("compute-sanitizer")
    if context.is_dry:
        found, missing = None, "in a dry run"
    else:
        yield launched(context)
    for tool in TOOLS:
        if found is None:
            yield {"what": tool, "skipped": missing}
            continue
        command = [
            found, "--tool", tool, "--error-exitcode", str(_ERROR_STATUS), "--print-limit", "50",
            *program,
        ]  # fmt: skip
        yield _watched(tool, command, context.limit / len(TOOLS), context.out)


def _watched(what: str, command: list[str], limit: float, out: Path) -> Row:
    log = out / f"sanitizer.{what.replace(' ', '_')}.log"
    log.unlink(missing_ok=True)
    outcome = run_limited(command, limit, log, cwd=ROOT, environment=_NO_CACHE)
    text = log.read_text(encoding="utf-8", errors="replace")
    row: Row = {"what": what, "seconds": round(outcome.seconds, 1), **summary(text)}
    if outcome.stopped:
        row["problem"] = f"{what}: stopped after {limit:.0f} s"
    elif row["errors"]:
        where = ", ".join(row["kernels"]) or "in none of our kernels"
        row["problem"] = f"{what}: {row['errors']} errors ({where}); see {log.name}"
    elif outcome.status or every_kernel.DONE not in text:
        row["problem"] = f"{what}: the program ended by {outcome.status}; see {log.name}"
    return row


def summary(text: str) -> Row:
    """How many errors a tool found, in which of our kernels, and the first lines it wrote."""
    counts = [int(count) for count in _SUMMARY.findall(text)]
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    return {
        "errors": sum(counts),
        "kernels": sorted(name for name in all_kernels() if any(name in line for line in lines)),
        "text": lines[:_MOST_LINES] if any(counts) else [],
    }


def launched(context: Context) -> Row:
    """Whether the program launches every kernel that there is; the names are the profiler's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        every_kernel.main(["--device", context.device])
    names = {event.name for event in found.events()}
    missing = sorted(
        kernel for kernel in all_kernels() if not any(kernel in name for name in names)
    )
    row: Row = {"what": "kernels launched", "count": len(all_kernels()) - len(missing)}
    if missing:
        row["problem"] = f"the program does not launch {', '.join(missing)}"
    return row
