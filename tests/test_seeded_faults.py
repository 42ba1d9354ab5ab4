"""Every fault can be seeded, one is seeded to its end, and none goes unnoticed silently."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "seeded_faults", ROOT / "tests" / "seeded_faults.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


seeded_faults = _load()
FAULTS = seeded_faults.faults()
SOURCE = "def add(a, b):\n    return a + b\n"
TEST = "from kernel import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.name}")
def test_the_text_of_every_fault_occurs_once(fault: object) -> None:
    assert seeded_faults.why_stale(fault) is None
    for path in fault.tests:  # type: ignore[attr-defined]
        assert (ROOT / path).exists()


def test_each_kernel_is_broken_in_several_ways() -> None:
    counts = Counter(fault.kernel for fault in FAULTS)
    assert min(counts.values()) >= 3
    triton = {
        str(path.relative_to(ROOT)) for path in (ROOT / "fastldm" / "ops").rglob("triton_*.py")
    }
    assert triton <= {fault.file for fault in FAULTS}
    built = {fault.file.split("/")[-1] for fault in FAULTS if fault.is_built}
    kernels = {"group_norm_silu.h", "diffusion_step.h", "attention.h", "box_tree_search.h"}
    assert kernels | {"geglu.h"} <= built


def test_a_fault_of_a_triton_kernel_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    status = seeded_faults.main(["diffusion_step_triton", "--fault", "NaN clipped"])
    out = capsys.readouterr().out
    assert "1 of 1 faults were noticed" in out, out
    assert "test_triton_kernel.py::test_nan_and_infinity_stay_where_they_are" in out
    assert status == 0


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package so small that starting pytest is all it takes."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "kernel.py").write_text(SOURCE)
    (root / "tests").mkdir()
    (root / "tests" / "test_kernel.py").write_text(TEST)
    return root


def _result(tree: Path, tmp_path: Path, new: str, old: str = "a + b", select: str = "") -> object:
    fault = seeded_faults.Fault(
        "kernel", "a fault", "kernel.py", old, new, ("tests/test_kernel.py",), select, False
    )
    (result,) = seeded_faults.try_faults([fault], seeded_faults.Copy(tmp_path, tree))
    assert (tree / "kernel.py").read_text() == SOURCE
    assert (tmp_path / "tree" / "kernel.py").read_text() == SOURCE
    assert f"| kernel | a fault | {_shown(result)} |" in seeded_faults.table([result])
    return result


def _shown(result: object) -> str:
    by = result.noticed_by  # type: ignore[attr-defined]
    return f"`{by}`" if by else f"**{result.problem}**"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "noticed_by", "problem"),
    [
        ({"new": "a - b"}, "tests/test_kernel.py::test_add", ""),
        ({"new": "__import__('os').abort()"}, "tests/test_kernel.py::test_add, by a crash", ""),
        ({"new": "b + a"}, "", "no test noticed"),
        ({"new": "a +"}, "", "its tests end by 2"),
        ({"new": "a - b", "old": "a * b"}, "", "its text occurs 0 times in kernel.py"),
        ({"new": "a, b", "old": "a"}, "", "its text occurs 3 times in kernel.py"),
        ({"new": "a + b"}, "", "it changes nothing"),
        ({"new": "a - b", "select": "nothing"}, "", "without it, its tests end by 5"),
    ],
)
def test_what_becomes_of_a_fault(
    changes: dict[str, str], noticed_by: str, problem: str, tree: Path, tmp_path: Path
) -> None:
    result = _result(tree, tmp_path, **changes)
    assert result.noticed_by == noticed_by  # type: ignore[attr-defined]
    assert result.problem.startswith(problem)  # type: ignore[attr-defined]


def test_a_fault_in_what_is_built(tree: Path, tmp_path: Path) -> None:
    """A build that fails ends its own fault; after the last one the sources are built anew."""
    (tree / "setup.py").write_text(
        "from pathlib import Path\n"
        "text = Path('kernel.cpp').read_text()\n"
        "assert 'broken' not in text, 'error: broken'\n"
        "Path('fastldm').mkdir(exist_ok=True)\n"
        "Path('fastldm/_C.so').write_text(text)\n"
    )
    (tree / "kernel.cpp").write_text("a sum")
    (tree / "tests" / "test_kernel.py").write_text(
        "def test_built():\n    assert open('fastldm/_C.so').read() == 'a sum'\n"
    )
    (tree / "tests" / "test_other.py").write_text((tree / "tests" / "test_kernel.py").read_text())

    def fault(new: str, tests: str = "tests/test_kernel.py", file: str = "kernel.cpp") -> object:
        old = "sum" if file == "kernel.cpp" else "a + b"
        return seeded_faults.Fault(
            "kernel", new, file, old, new, (tests,), "", file == "kernel.cpp"
        )

    chosen = [
        fault("product"), fault("broken"), fault("sum of sums"),
        fault("b + a", "tests/test_other.py", "kernel.py"),
    ]  # fmt: skip
    results = list(seeded_faults.try_faults(chosen, seeded_faults.Copy(tmp_path, tree)))
    noticed = "tests/test_kernel.py::test_built"
    assert [result.noticed_by for result in results] == [noticed, "", noticed, ""]
    assert results[1].problem.startswith("it does not compile: ")
    assert results[3].problem == "no test noticed"


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def found(noticed_by: str) -> int:
        result = seeded_faults.Result(FAULTS[0], noticed_by, "" if noticed_by else "unnoticed")
        monkeypatch.setattr(seeded_faults, "Copy", lambda _: None)
        monkeypatch.setattr(seeded_faults, "try_faults", lambda *_: iter([result]))
        status: int = seeded_faults.main([])
        return status

    assert (found("test_a"), found("")) == (0, 1)
    assert "0 of 1 faults were noticed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        seeded_faults.main(["no_such_kernel"])
