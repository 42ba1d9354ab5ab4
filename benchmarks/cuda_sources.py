"""Compile the CUDA sources without a GPU, and read what the compiler made of their kernels."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parent.parent
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ACCESS = re.compile(r"\b(LDG|STG|LDS|LDL|STL|FFMA)\b([\w.]*)")


@dataclass(frozen=True)
class CudaKernel:
    """One kernel, as compiled for one architecture."""

    name: str
    registers: int
    shared_bytes: int
    local_bytes: int
    """Stack frame and local memory of a thread: spilled registers, or arrays out of registers."""
    loads: tuple[int, ...]
    """Widths of its global loads, in bytes a thread."""
    stores: tuple[int, ...]
    shared_loads: tuple[int, ...]
    multiply_adds: int
    """FFMA instructions."""


def compiler() -> Path | None:
    """nvcc of CUDA_HOME, or that on the PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    return Path(found) if found else None


def release(nvcc: Path) -> str:
    """The toolkit's version, as 13.0."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    assert match is not None
    return match.group(1)


def kernels(source: Path, architecture: int, nvcc: Path) -> list[CudaKernel]:
    """The kernels of one source, by name.

    They are read from the extension where that was built after the sources last changed, and
    otherwise compiled, in a minute for each architecture.
    """
    library = _current_extension()
    if library is not None:
        found = _of_source(source, _kernels_in(library, architecture))
        if found:
            return found
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.cubin")
        command = [
            nvcc, "-std=c++20", "-O3", "--fmad=false", "-cubin", f"-arch=sm_{architecture}",
            f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", source, "-o", binary,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return _of_source(source, _kernels_in(binary, architecture))


def _current_extension() -> Path | None:
    built = [(path.stat().st_mtime, path) for path in (ROOT / "fastldm").glob("_C.*.so")]
    sources = [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]
    changed = max(path.stat().st_mtime for path in sources)
    return next((path for seconds, path in sorted(built, reverse=True) if seconds > changed), None)


@functools.cache
def _kernels_in(binary: Path, architecture: int) -> dict[str, CudaKernel]:
    """Those of a cubin or a library, by symbol."""
    resources, code = (
        _dump(binary, architecture, what) for what in ("--dump-resource-usage", "--dump-sass")
    )
    usage = dict(re.findall(r"Function (\w+):\s*\n\s*(.+)", resources))
    return {
        symbol: _read(_readable(symbol), usage[symbol], text) for symbol, text in _functions(code)
    }


def _of_source(source: Path, found: dict[str, CudaKernel]) -> list[CudaKernel]:
    # The compiler names an unnamed namespace after the file.
    own = [kernel for symbol, kernel in found.items() if f"_{source.stem}_cu_" in symbol]
    return sorted(own, key=lambda kernel: kernel.name)


def _dump(binary: Path, architecture: int, what: str) -> str:
    command = [_TOOLS / "cuobjdump", f"-arch=sm_{architecture}", what, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _functions(code: str) -> Iterator[tuple[str, str]]:
    for part in code.split("Function : ")[1:]:
        symbol, _, text = part.partition("\n")
        yield symbol.strip(), text


def _readable(symbol: str) -> str:
    """The kernel's name and template arguments, of an Itanium symbol in an unnamed namespace."""
    match = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)E[Ev])?", symbol)
    assert match is not None, symbol
    name, arguments = match.groups()
    if not arguments:
        return name
    simple = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
    return f"{name}<{simple.get(arguments, arguments.removeprefix('Li'))}>"


def _read(name: str, usage: str, code: str) -> CudaKernel:
    resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    widths: dict[str, set[int]] = {}
    multiply_adds = 0
    for operation, suffix in _ACCESS.findall(code):
        if operation == "FFMA":
            multiply_adds += 1
        else:
            widths.setdefault(operation, set()).add(_width(suffix))
    assert not {"LDL", "STL"} & set(widths) or resources["STACK"] + resources["LOCAL"]
    loads, stores, shared = (tuple(sorted(widths.get(key, ()))) for key in ("LDG", "STG", "LDS"))
    return CudaKernel(
        name,
        resources["REG"],
        resources["SHARED"],
        resources["STACK"] + resources["LOCAL"],
        loads,
        stores,
        shared,
        multiply_adds,
    )


def _width(suffix: str) -> int:
    for bits in (128, 64):
        if f".{bits}" in suffix:
            return bits // 8
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(suffix.rpartition(".")[2], 4)
