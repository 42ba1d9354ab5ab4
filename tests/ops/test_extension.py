"""Importing loads nothing heavy, and a missing or broken extension never breaks an import."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastldm.ops import _extension


@pytest.fixture
def fresh_load(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The extension is looked for anew, and again after the test."""
    monkeypatch.setattr(_extension, "_load", _extension._load.__wrapped__)
    return monkeypatch


def _python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_operators_loads_neither_triton_nor_the_extension_nor_cuda() -> None:
    code = (
        "import sys, fastldm.ops, torch\n"
        "print([m for m in ('triton', 'fastldm._C') if m in sys.modules])\n"
        "print(torch.cuda.is_initialized())\n"
        "x = torch.randn(1, 4, 2, 2)\n"
        "with fastldm.ops.backend('reference'):\n"
        "    fastldm.ops.cross_attention(x, x, x)\n"
        "print('fastldm._C' in sys.modules)\n"
        "fastldm.ops.vector_quantize(x, torch.randn(3, 4))\n"
        "print('fastldm._C' in sys.modules)\n"
    )
    usable = _extension.problem() is None
    assert _python(code).splitlines() == ["[]", "False", "False", str(usable)]


def test_damaged_library(tmp_path: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / f"_C{suffix}").write_bytes(b"\x7fELF, but no more")
    code = (
        "import fastldm, torch\n"
        f"fastldm.__path__.insert(0, {str(tmp_path)!r})\n"
        "from fastldm import ops\n"
        "x = torch.randn(1, 4, 2, 2)\n"
        "print(ops.vector_quantize(x, torch.randn(3, 4)).indices.shape)\n"
        "print(ops.explain('vector_quantize', x, x[0, 0]))\n"
    )
    out = _python(code)
    assert "torch.Size([1, 2, 2])" in out
    assert "served by reference" in out
    assert "cpp: the extension fastldm._C cannot be loaded (ImportError: " in out
    assert "reinstall with" in out


def test_missing_library(fresh_load: pytest.MonkeyPatch) -> None:
    fresh_load.setitem(sys.modules, "fastldm._C", None)
    problem = _extension.problem()
    assert problem is not None
    assert "is not installed" in problem
    with pytest.raises(ImportError, match="is not installed"):
        _extension.extension()


@pytest.mark.parametrize(("built", "usable"), [("1.13.1", False), ("same", True)])
def test_library_of_another_torch(built: str, usable: bool, fresh_load: pytest.MonkeyPatch) -> None:
    major, minor = torch.__version__.split(".")[:2]
    module = ModuleType("fastldm._C")
    module.torch_version = f"{major}.{minor}.99" if built == "same" else built  # type: ignore[attr-defined]
    fresh_load.setitem(sys.modules, "fastldm._C", module)
    problem = _extension.problem()
    if usable:
        assert problem is None
        assert _extension.extension() is module
    else:
        assert problem is not None
        assert f"was built for torch {built} and this is torch {torch.__version__}" in problem


@pytest.mark.parametrize(
    ("has_cuda", "capability", "reason"),
    [
        (False, (9, 0), "was built without CUDA: no CUDA toolkit of torch's major version"),
        (True, (7, 5), "its CUDA kernels need sm_80 or newer, cuda:0 is sm_75"),
        (True, (8, 0), None),
    ],
)
def test_cuda_kernels(
    has_cuda: bool,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("fastldm._C")
    module.has_cuda = has_cuda  # type: ignore[attr-defined]
    monkeypatch.setattr(_extension, "_load", lambda: (module, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = _extension.cuda_problem(torch.device("cuda:0"))
    assert problem is None if reason is None else reason in str(problem)
    assert _extension.cuda_problem(torch.device("cpu")) is None
