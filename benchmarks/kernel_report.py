"""The compile gate: ``python -m benchmarks.kernel_report`` compiles every kernel without a GPU.

It writes docs/kernels.md and fails where a kernel spills registers, accesses a contiguous operand
in less than 16 bytes a thread, or lacks the tensor-core instructions that it should have. With
``--check`` the page is compared instead of written, and with ``--every 3`` only as to the first
call of each three.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton

from benchmarks import specialisations
from benchmarks.compilation import ARCHITECTURES, Launch, launches
from benchmarks.specialisations import Case
from fastldm.ops import _triton

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
OPERATORS = tuple(module.name for module in pkgutil.iter_modules(specialisations.__path__))
_HEADER = f"""# What the compiler makes of the kernels

Made by `python -m benchmarks.kernel_report`, without a GPU, with Triton {triton.__version__}.
Every kernel is compiled as its launcher would launch it, for
{", ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)}; where three figures stand, they
are for these, in order. No kernel has a stack frame or spills a register.

- **loads, stores**: bytes that a thread moves with one instruction, by pointer argument.
- **moved / minimum**: bytes that all kernels of the call load and store in global memory, scratch
  included, over those of reading each input once and writing each output once.
"""
_COLUMNS = (
    "kernel", "grid", "warps", "registers", "shared, KiB", "tensor-core instructions", "loads",
    "stores",
)  # fmt: skip


def section(operator: str, every: int = 1) -> tuple[str, list[str]]:
    """The part of the page on one operator, and what is wrong with its kernels.

    Of the cases only each `every`-th is compiled and given, beginning with the first.
    """
    lines, problems = [f"## {operator}", ""], []
    module = importlib.import_module(f"benchmarks.specialisations.{operator}")
    if hasattr(module, "section"):
        text, problems = module.section()
        return text, problems
    for case in itertools.islice(module.cases(), 0, None, every):
        compiled = [launches(case.call, architecture) for architecture in ARCHITECTURES]
        for architecture, found in zip(ARCHITECTURES, compiled, strict=True):
            where = f"{operator}, {case.name}, sm_{architecture}"
            problems += [f"{where}: {text}" for text in _problems(case, found)]
        lines += [*_table(case, list(zip(*compiled, strict=True))), ""]
    return "\n".join(lines), problems


def _problems(case: Case, found: Sequence[Launch]) -> Iterator[str]:
    reached = {name for launch in found for name in (*launch.loads, *launch.stores)}
    for name in sorted(set(case.wide) - reached):
        yield f"no kernel accesses {name}"
    for name in sorted(set(case.tensor_cores) - {launch.kernel for launch in found}):
        yield f"{name} is not launched"
    for launch in found:
        if launch.local_bytes:
            yield f"{launch.kernel} keeps {launch.local_bytes} bytes a thread in local memory"
        if launch.kernel in case.tensor_cores and not launch.tensor_core_instructions:
            yield f"{launch.kernel} has no tensor-core instruction"
        for kind, widths in (("loads", launch.loads), ("stores", launch.stores)):
            for name in case.wide:
                if min(widths.get(name, (16,))) < 16:
                    yield f"{launch.kernel} {kind} {name} in {widths[name]} bytes a thread"


def _table(case: Case, by_kernel: Sequence[tuple[Launch, ...]]) -> Iterator[str]:
    ratio = case.moved_bytes / case.minimum_bytes
    yield (
        f"**{case.name}**: {case.moved_bytes / 1e6:.4g} MB moved, "
        f"{case.minimum_bytes / 1e6:.4g} MB minimum, ratio {ratio:.3f}"
    )
    yield ""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|" + " --- |" * len(_COLUMNS)
    for versions in by_kernel:
        first = versions[0]
        cells = (
            f"`{first.kernel}`",
            "×".join(map(str, first.grid)),
            first.num_warps,
            _each(version.registers for version in versions),
            _each(round(version.shared_bytes / 1024, 1) for version in versions),
            _each(version.tensor_core_instructions for version in versions),
            _widths(first.loads),
            _widths(first.stores),
        )
        yield f"| {' | '.join(map(str, cells))} |"


def _each(values: Iterator[float]) -> str:
    """One figure where all architectures agree."""
    found = [f"{value:g}" for value in values]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def _widths(accesses: dict[str, tuple[int, ...]]) -> str:
    named = (f"{name.removesuffix('_ptr')} {'+'.join(map(str, w))}" for name, w in accesses.items())
    return ", ".join(named)


def unavailable(operator: str) -> str | None:
    """Why an operator's kernels cannot be compiled here."""
    module = importlib.import_module(f"benchmarks.specialisations.{operator}")
    reason: str | None = module.unavailable() if hasattr(module, "unavailable") else None
    return reason


def page() -> tuple[str, dict[str, str]]:
    """The page's header, and its sections by operator."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    header, *sections = text.split("\n## ")
    return header, {part.splitlines()[0]: f"## {part}" for part in sections}


def stale(operator: str, fresh: str, every: int = 1) -> bool:
    """Whether the page says something else; figures are comparable for one compiler."""
    header, sections = page()
    old = sections.get(operator, "")
    same_compiler = header.strip() == _HEADER.strip() and _compiler(old) == _compiler(fresh)
    if every > 1:
        lines = fresh.splitlines() if same_compiler else _calls(fresh)
        return not set(lines) <= set(old.splitlines())
    if same_compiler or not old:
        return old.strip() != fresh.strip()
    return _calls(old) != _calls(fresh)


def _compiler(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Compiled by")]


def _calls(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("**")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or compare it; 1 if a kernel falls short or the page is stale."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernel_report", description=__doc__)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(OPERATORS)}; all if none")
    parser.add_argument("--check", action="store_true", help="compare the page, do not write it")
    parser.add_argument("--every", type=int, default=1, help="with --check: one in so many calls")
    options = parser.parse_args(arguments)
    chosen = options.operators or OPERATORS
    if _triton.interprets():
        parser.error("unset TRITON_INTERPRET: in the interpreter there is nothing to compile")
    if options.every > 1 and not options.check:
        parser.error("--every: the page has all calls; it goes with --check")
    if unknown := set(chosen) - set(OPERATORS):
        parser.error(f"no specialisations of {', '.join(sorted(unknown))}")
    sections, problems = page()[1], []
    for operator in chosen:
        if reason := unavailable(operator):
            print(f"{operator}: not compiled: {reason}", file=sys.stderr)
            continue
        text, found = section(operator, options.every)
        sections[operator] = text
        problems += found
        if options.check and stale(operator, text, options.every):
            problems.append(f"docs/kernels.md is stale on {operator}: run {parser.prog}")
    if not options.check:
        texts = [
            sections[operator].rstrip() + "\n" for operator in OPERATORS if operator in sections
        ]
        PAGE.write_text("\n".join([_HEADER, *texts]), encoding="utf-8")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
