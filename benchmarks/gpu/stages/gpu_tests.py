"""The tests that are marked gpu, and the Triton kernels' own tests, which run on the GPU there."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.records import ROOT, Row
from benchmarks.gpu.stages import Context

TESTS = ROOT / "tests" / "ops"
_SELECTIONS = (("gpu", "mark.gpu"), ("not gpu", "triton_device"))
"""A marker expression, and what a file with such tests has in it."""
_IN_DRY_RUN = _SELECTIONS[:1]
_MOST_FAILURES = 20


def run(context: Context) -> Iterator[Row]:
    if importlib.util.find_spec("pytest") is None:
        yield {"what": "tests", "problem": "pytest is not installed: no test was run"}
        return
    operators = sorted(path for path in TESTS.iterdir() if list(path.glob("test_*.py")))
    chosen = [
        (marker, folder, files)
        for marker, trace in (_IN_DRY_RUN if context.is_dry else _SELECTIONS)
        for folder in operators
        for files in [selected(folder, trace)]
    ]
    # Each operator in a process of its own: a kernel that breaks the device breaks no other's.
    end = time.monotonic() + context.limit
    for marker, folder, files in chosen:
        what = f"{folder.name}, {marker}"
        if not files and marker == "gpu":
            yield {"what": what, "problem": f"{folder.name} has no test marked gpu"}
        elif files:
            left = end - time.monotonic()
            yield {"what": what, **run_tests(files, marker, left / 2, context.out)}


def selected(folder: Path, trace: str) -> list[Path]:
    """The test files in which `trace` occurs."""
    return [
        path for path in sorted(folder.glob("test_*.py"))
        if trace in path.read_text(encoding="utf-8")
    ]  # fmt: skip


def run_tests(files: list[Path], marker: str, limit: float, out: Path) -> Row:
    """Counts, failures, and the worst error as a share of what is allowed."""
    folder = files[0].parent.name
    name = f"gpu_tests.{folder}.{marker.replace(' ', '_')}"
    found = out / f"{name}.xml"
    found.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider",
        "--durations=5", f"--junitxml={found}", *files,
    ]  # fmt: skip
    outcome = run_limited(command, limit, out / f"{name}.log", cwd=ROOT)
    row: Row = {"files": [path.name for path in files], "seconds": round(outcome.seconds, 1)}
    if outcome.stopped:
        return {**row, "problem": f"stopped after {limit:.0f} s; see {name}.log"}
    if not found.exists():
        return {**row, "problem": f"pytest ended by {outcome.status}; see {name}.log"}
    row |= read_results(found)
    if row["failures"] or outcome.status not in (0, 5):
        row["problem"] = f"{folder}: {row['failed']} of {row['tests']} tests failed"
    elif row["passed"] == 0 and row["tests"]:
        row["skipped"] = f"all {row['tests']} tests were skipped: {row['skips']}"
    return row


def read_results(path: Path) -> Row:
    """What pytest's JUnit file says."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failures, skips, worst = [], set(), 0.0
    for case in cases:
        bad = case.find("failure")
        bad = case.find("error") if bad is None else bad
        if bad is not None:
            first = (bad.get("message") or "").splitlines()[:1]
            failures.append(f"{case.get('name')}: {' '.join(first)[:300]}")
        skip = case.find("skipped")
        if skip is not None:
            skips.add(skip.get("message") or "")
        for entry in case.iter("property"):
            if entry.get("name") == "error / allowed":
                worst = max(worst, float(entry.get("value", "0")))
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "tests": len(cases),
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "failures": failures[:_MOST_FAILURES],
        "skips": sorted(skips),
        "worst error / allowed": round(worst, 3),
    }
