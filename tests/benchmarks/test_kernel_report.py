"""The compile gate passes for every operator, the page is fresh, and a bad kernel is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import kernel_report
from benchmarks.compilation import Launch
from benchmarks.specialisations import Case

ROOT = Path(__file__).resolve().parents[2]
GOOD = Launch(
    kernel="_some_kernel",
    grid=(4, 2, 1),
    num_warps=4,
    shared_bytes=1024,
    registers=40,
    local_bytes=0,
    loads={"x_ptr": (16,), "weight_ptr": (4,)},
    stores={"y_ptr": (16,)},
    tensor_core_instructions=8,
)
CASE = Case(
    "a call", lambda: None, 100, 150, wide=("x_ptr", "y_ptr"), tensor_cores=("_some_kernel",)
)


# The kernels of attention take longest to compile: the page's script compiles the other calls.
EVERY = {"cross_attention": 3}


@pytest.mark.parametrize("operator", kernel_report.OPERATORS)
def test_the_gate(operator: str) -> None:
    every = ["--every", str(EVERY.get(operator, 1))]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_report", "--check", operator, *every],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"local_bytes": 16}, "_some_kernel keeps 16 bytes a thread in local memory"),
        ({"tensor_core_instructions": 0}, "_some_kernel has no tensor-core instruction"),
        ({"loads": {"x_ptr": (2, 16)}}, "_some_kernel loads x_ptr in (2, 16) bytes a thread"),
        ({"stores": {"y_ptr": (8,)}}, "_some_kernel stores y_ptr in (8,) bytes a thread"),
        ({"stores": {}}, "no kernel accesses y_ptr"),
    ],
)
def test_what_is_refused(changes: dict[str, object], problem: str) -> None:
    assert list(kernel_report._problems(CASE, [GOOD])) == []
    assert list(kernel_report._problems(CASE, [dataclasses.replace(GOOD, **changes)])) == [problem]  # type: ignore[arg-type]


def test_a_kernel_that_is_not_launched_is_missed() -> None:
    other = dataclasses.replace(GOOD, kernel="_another_kernel")
    assert list(kernel_report._problems(CASE, [other])) == ["_some_kernel is not launched"]


def test_staleness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "kernels.md"
    monkeypatch.setattr(kernel_report, "PAGE", page)
    text = "\n".join(["## an_op", "", *kernel_report._table(CASE, [(GOOD, GOOD, GOOD)]), ""])
    assert kernel_report.stale("an_op", text)
    page.write_text("\n".join([kernel_report._HEADER, "## another\n", text]), encoding="utf-8")
    assert not kernel_report.stale("an_op", text)
    assert kernel_report.stale("an_op", text.replace("40", "41"))


def test_staleness_as_to_some_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "kernels.md"
    monkeypatch.setattr(kernel_report, "PAGE", page)
    other = dataclasses.replace(CASE, name="another call")
    tables = ["\n".join(kernel_report._table(case, [(GOOD,) * 3])) for case in (CASE, other)]
    page.write_text("\n\n".join([kernel_report._HEADER, "## an_op", *tables]), encoding="utf-8")
    some = f"## an_op\n\n{tables[1]}\n"
    assert not kernel_report.stale("an_op", some, every=2)
    assert kernel_report.stale("an_op", some)
    assert kernel_report.stale("an_op", some.replace("40", "41"), every=2)


def test_figures_of_another_triton_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "kernels.md"
    monkeypatch.setattr(kernel_report, "PAGE", page)
    text = "\n".join(["## an_op", "", *kernel_report._table(CASE, [(GOOD, GOOD, GOOD)]), ""])
    page.write_text("\n".join(["# made by an older Triton\n", text]), encoding="utf-8")
    assert not kernel_report.stale("an_op", text.replace("40", "41"))
    assert kernel_report.stale("an_op", text.replace("a call", "another call"))
