"""What compute-sanitizer writes is read as it means it; a missing one is named."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import every_kernel
from benchmarks.gpu.stages import Context, sanitizer

PYTHON = sys.executable
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void fastldm::cuda::<unnamed>::screen_narrow_kernel<(int)3>(long)+0x160
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _group_norm_silu_fwd_kernel+0x100
=========     and Read access at _group_norm_silu_fwd_kernel+0x170 [9 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n{}\n========= {} SUMMARY: 0 {}\n"


@pytest.mark.parametrize(
    ("text", "errors", "kernels"),
    [
        (MEMCHECK, 1, ["screen_narrow_kernel"]),
        (RACECHECK, 1, ["_group_norm_silu_fwd_kernel"]),
        (MEMCHECK.replace("screen_narrow_kernel", "at::native::sort"), 1, []),
        (CLEAN.format("done", "ERROR", "errors"), 0, []),
        (CLEAN.format("done", "RACECHECK", "hazards displayed (0 errors, 0 warnings)"), 0, []),
    ],
)
def test_summary(text: str, errors: int, kernels: list[str]) -> None:
    found = sanitizer.summary(text)
    assert (found["errors"], found["kernels"]) == (errors, kernels)
    assert found["text"] == (
        [line for line in text.splitlines() if line.startswith("====")] if errors else []
    )


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!{PYTHON}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A device for which the program only says that it is done."""
    _script(tmp_path / "program", f"print({every_kernel.DONE!r})")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program"))
    monkeypatch.setattr(sanitizer, "launched", lambda _: {"what": "kernels launched"})
    monkeypatch.setenv("PATH", str(tmp_path))
    return Context("cuda", tmp_path, 60)


def test_a_missing_tool_is_named(context: Context) -> None:
    rows = {row["what"]: row for row in sanitizer.run(context)}
    for tool in sanitizer.TOOLS:
        assert rows[tool] == {"what": tool, "skipped": "compute-sanitizer is not on the PATH"}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            f"print({MEMCHECK!r}); raise SystemExit(99)",
            "memcheck: 1 errors (screen_narrow_kernel); see sanitizer.memcheck.log",
        ),
        ("", "memcheck: the program ended by 0; see sanitizer.memcheck.log"),
        (f"print({every_kernel.DONE!r})", None),
    ],
)
def test_what_a_tool_finds(
    body: str, problem: str | None, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizer, "TOOLS", ("memcheck",))
    _script(context.out / "compute-sanitizer", body)
    *_, row = sanitizer.run(context)
    assert row.get("problem") == problem


def test_a_program_that_fails_ends_the_stage(context: Context) -> None:
    _script(Path(sys.executable), "raise SystemExit(3)")
    (row,) = sanitizer.run(context)
    assert row["problem"] == (
        "program alone: the program ended by 3; see sanitizer.program_alone.log"
    )
