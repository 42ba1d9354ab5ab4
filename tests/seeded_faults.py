"""Breaks each kernel in several ways and shows which test notices.

Run as ``python tests/seeded_faults.py``.
The faults are in ``tests/faults/*.toml``, one file a kernel file: what is replaced by what, and the
tests that are to notice. They are seeded one at a time into a copy of the tree, where the C++
sources are built anew. The exit status is 1 if a fault goes unnoticed, cannot be seeded or cannot
be run, or if the tests fail without one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NOT_COPIED = shutil.ignore_patterns(
    ".*", "build", "outputs", "docs", "examples", "__pycache__", "*.egg-info"
)
_SECONDS = 900
_TOO_LONG = 124
"""The exit status of a command that ran longer than that, as of the program timeout."""
_CRASHED = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
_PASSED, _FAILED = 0, 1
"""pytest's exit status where all tests passed, and where some failed."""


@dataclass(frozen=True)
class Fault:
    """One replacement in one file."""

    kernel: str
    """Name of the file of faults."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str
    """pytest's ``-k`` expression."""
    is_built: bool
    """Whether the extension has to be built for the tests to see it."""

    @property
    def selection(self) -> tuple[str, ...]:
        """What pytest is given."""
        chosen = " ".join(self.select.split())
        return (*self.tests, *(("-k", chosen) if chosen else ()))


@dataclass(frozen=True)
class Result:
    """What became of a fault."""

    fault: Fault
    noticed_by: str
    """The first test that failed; empty where none did."""
    problem: str = ""


def faults(folder: Path = ROOT / "tests" / "faults") -> list[Fault]:
    """All that are described."""
    return [fault for path in sorted(folder.glob("*.toml")) for fault in _described_in(path)]


def _described_in(path: Path) -> Iterator[Fault]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    entries = table.pop("fault")
    for entry in entries:
        given = {"select": "", "is_built": False, **table, **entry}
        yield Fault(kernel=path.stem, **{**given, "tests": tuple(given["tests"])})


def why_stale(fault: Fault, root: Path = ROOT) -> str | None:
    """Why a fault cannot be seeded: its text has to occur once."""
    path = root / fault.file
    if not path.exists():
        return f"there is no {fault.file}"
    count = path.read_text(encoding="utf-8").count(fault.old)
    if count != 1:
        return f"its text occurs {count} times in {fault.file}"
    if fault.old == fault.new:
        return "it changes nothing"
    return None


class Copy:
    """A tree in which faults are seeded."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder = folder / "tree"
        shutil.copytree(root, self.folder, ignore=_NOT_COPIED)

    def build(self) -> str:
        """Build the C++ sources; why not, or nothing."""
        for library in (self.folder / "fastldm").glob("*.so"):
            library.unlink()
        status, text = self._run(
            ["setup.py", "build_ext", "--inplace"],
            # Tests of what is computed need not wait for a better optimised kernel.
            {"FASTLDM_BUILD": "cpp", "FASTLDM_CXXFLAGS": "-O1"},
        )
        built = list((self.folder / "fastldm").glob("*.so"))
        return "" if built and status == 0 else f"it does not compile: {_last_error(text)}"

    def test(self, selection: Sequence[str]) -> tuple[int, str]:
        """pytest's exit status and output, until a test fails."""
        command = ["-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
        return self._run([*command, *selection], {})

    def seed(self, fault: Fault) -> str:
        """Replace the fault's text; the text of the file before."""
        path = self.folder / fault.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        return text

    def restore(self, fault: Fault, text: str) -> None:
        """Undo `seed`."""
        (self.folder / fault.file).write_text(text, encoding="utf-8")

    def _run(self, arguments: Sequence[str], variables: dict[str, str]) -> tuple[int, str]:
        # Bytecode is told apart by the second in which a file was written, and its length.
        fixed = {"PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": ""}
        try:
            result = subprocess.run(
                [sys.executable, *arguments],
                cwd=self.folder,
                env={**os.environ, **fixed, **variables},
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _TOO_LONG, f"longer than {_SECONDS} s"
        return result.returncode, result.stdout + result.stderr


def _last_error(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    return errors[0][:300] if errors else "no reason given"


def try_faults(chosen: Sequence[Fault], copy: Copy) -> Iterator[Result]:
    """Seed each fault and run its tests, which have to pass without it."""
    passing: dict[tuple[str, ...], str] = {}
    problem = copy.build() if any(fault.is_built for fault in chosen) else ""
    is_broken = False
    for fault in chosen:
        stale = why_stale(fault, copy.folder)
        if stale or (fault.is_built and problem):
            yield Result(fault, "", stale or problem)
            continue
        if is_broken and not (fault.is_built and fault.selection in passing):
            copy.build()
            is_broken = False
        if fault.selection not in passing:
            passing[fault.selection] = _why_no_baseline(*copy.test(fault.selection))
        if passing[fault.selection]:
            yield Result(fault, "", passing[fault.selection])
            continue
        before = copy.seed(fault)
        is_broken |= fault.is_built
        why_not = copy.build() if fault.is_built else ""
        yield Result(fault, "", why_not) if why_not else _tried(fault, copy)
        copy.restore(fault, before)


def _why_no_baseline(status: int, text: str) -> str:
    if status == _PASSED:
        return ""
    return f"without it, its tests end by {status}: {_last_line(text)}"


def _tried(fault: Fault, copy: Copy) -> Result:
    status, text = copy.test(fault.selection)
    if status == _PASSED:
        return Result(fault, "", "no test noticed")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", text, re.MULTILINE)
    if status in _CRASHED:
        # As Python's fault handler tells, which pytest turns on.
        frame = re.search(r'File ".*?/(tests/[^"]+)", line \d+ in (test_\w+)', text)
        if frame is not None:
            return Result(fault, f"{frame.group(1)}::{frame.group(2)}, by a crash")
    if status != _FAILED or failed is None:
        return Result(fault, "", f"its tests end by {status}: {_last_line(text)}")
    return Result(fault, failed.group(1))


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:300]


def table(results: Sequence[Result]) -> str:
    """Markdown: kernel, fault, and the test that noticed."""
    lines = ["| kernel | fault | noticed by |", "| --- | --- | --- |"]
    for result in results:
        seen = f"`{result.noticed_by}`" if result.noticed_by else f"**{result.problem}**"
        lines.append(f"| {result.fault.kernel} | {result.fault.name} | {seen} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """1 unless every fault is noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    known = faults()
    names = sorted({fault.kernel for fault in known})
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(names)}; all if none")
    parser.add_argument("--fault", help="only those with this in their name")
    parser.add_argument("--no-build", action="store_true", help="without those of C++ sources")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels) - set(names):
        parser.error(f"no faults of {', '.join(sorted(unknown))}")
    chosen = [
        fault for fault in known
        if fault.kernel in (options.kernels or names) and (options.fault or "") in fault.name
        and not (options.no_build and fault.is_built)
    ]  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for result in try_faults(chosen, Copy(Path(folder))):
            results.append(result)
            fault, seen = result.fault, result.noticed_by or result.problem
            print(f"{fault.kernel}: {fault.name}: {seen}", file=sys.stderr, flush=True)
    print(table(results))
    missed = sum(not result.noticed_by for result in results)
    print(f"\n{len(results) - missed} of {len(results)} faults were noticed")
    return 1 if missed or not results else 0


if __name__ == "__main__":
    raise SystemExit(main())
