"""The names of all kernels, from the sources."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.records import ROOT

_TRITON = re.compile(r"^def (_\w+_kernel)\(", re.MULTILINE)
_CUDA = re.compile(r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+_kernel)\(")


def triton_kernels(root: Path = ROOT) -> set[str]:
    """Functions that are launched, in the Triton files."""
    return _found(_TRITON, (root / "fastldm" / "ops").rglob("triton_*.py"))


def cuda_kernels(root: Path = ROOT) -> set[str]:
    """``__global__`` functions."""
    return _found(_CUDA, (root / "csrc").rglob("*.cu"))


def all_kernels() -> set[str]:
    """Both."""
    return triton_kernels() | cuda_kernels()


def _found(pattern: re.Pattern[str], files: Iterable[Path]) -> set[str]:
    return {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}
