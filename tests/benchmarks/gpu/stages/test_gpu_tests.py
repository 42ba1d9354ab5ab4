"""What pytest found is read from its own file; what did not run is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.stages import Context, gpu_tests

_TESTS = """
import pytest, time

@pytest.fixture
def note(record_property):
    record_property("error / allowed", 0.25)

@pytest.mark.gpu
def test_good(note):
    pass

@pytest.mark.gpu
def test_bad():
    assert 1 == 2, "one is not two"

@pytest.mark.gpu
def test_skipped():
    pytest.skip("no room")

def test_of_another_selection():
    assert 0
"""


@pytest.fixture
def operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tests"
    (folder / "an_op").mkdir(parents=True)
    (folder / "an_op" / "test_kernel.py").write_text(_TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu_tests, "TESTS", folder)
    monkeypatch.setattr(gpu_tests, "ROOT", folder)
    return folder


def test_counts_failures_and_errors(operators: Path, tmp_path: Path) -> None:
    row = gpu_tests.run_tests([operators / "an_op" / "test_kernel.py"], "gpu", 60, tmp_path)
    assert (row["tests"], row["passed"], row["failed"]) == (3, 1, 1)
    assert row["failures"] == ["test_bad: AssertionError: one is not two"]
    assert row["skips"] == ["no room"]
    assert row["worst error / allowed"] == 0.25
    assert row["problem"] == "an_op: 1 of 3 tests failed"


def test_a_file_that_cannot_be_imported(operators: Path, tmp_path: Path) -> None:
    broken = operators / "an_op" / "test_kernel.py"
    broken.write_text("import nothing_of_this_name\n")
    row = gpu_tests.run_tests([broken], "gpu", 60, tmp_path)
    assert row["problem"] == "an_op: 1 of 1 tests failed"


def test_a_hanging_test(operators: Path, tmp_path: Path) -> None:
    slow = operators / "an_op" / "test_kernel.py"
    slow.write_text("import time\ntime.sleep(600)\n")
    row = gpu_tests.run_tests([slow], "gpu", 2, tmp_path)
    assert row["problem"] == "stopped after 2 s; see gpu_tests.an_op.gpu.log"


def test_an_operator_without_such_tests_is_named(operators: Path, tmp_path: Path) -> None:
    (operators / "another").mkdir()
    (operators / "another" / "test_cpp.py").write_text("")
    rows = {row["what"]: row for row in gpu_tests.run(Context("cuda", tmp_path, 60))}
    assert rows["another, gpu"]["problem"] == "another has no test marked gpu"
    assert rows["an_op, gpu"]["failed"] == 1
    assert "an_op, not gpu" not in rows


def test_the_files_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, lookup = (gpu_tests.TESTS / name for name in ("group_norm_silu", "vector_quantize"))
    assert [path.name for path in gpu_tests.selected(norm, "mark.gpu")] == [
        "test_triton_kernel_gpu.py"
    ]
    assert [path.name for path in gpu_tests.selected(lookup, "mark.gpu")] == ["test_cuda.py"]
    assert "test_triton_kernel.py" in {
        path.name for path in gpu_tests.selected(norm, "triton_device")
    }
