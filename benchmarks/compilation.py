"""Compile what a Triton launcher would launch, without a GPU, and read what the compiler made.

The launcher itself runs, on tensors of the device "meta" and under a driver that compiles and does
not launch: so the specialisations are those that Triton makes of these arguments on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

ARCHITECTURES = (80, 90, 100)
# Shared memory that one block can have, in bytes.
_SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as compiled for one architecture."""

    kernel: str
    grid: tuple[int, ...]
    num_warps: int
    shared_bytes: int
    registers: int
    local_bytes: int
    """Stack frame and local memory of a thread: spilled registers, or arrays out of registers."""
    loads: dict[str, tuple[int, ...]]
    """Pointer argument → the widths of its global loads, in bytes a thread."""
    stores: dict[str, tuple[int, ...]]
    tensor_core_instructions: int


class _CompileOnly:
    """A driver for a GPU that is not there."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_MEMORY[device]}


def launches(call: Callable[[], Any], architecture: int) -> list[Launch]:
    """What `call`, which runs a launcher on meta tensors, would launch."""
    with _recorded(architecture) as found:
        call()
    return found


@contextmanager
def _recorded(architecture: int) -> Iterator[list[Launch]]:
    found: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_read(compiled, grid, [p.name for p in self.params]))
        return compiled

    driver.set_active(_CompileOnly(architecture))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def _read(compiled: Any, grid: tuple[int, ...], parameters: list[str]) -> Launch:
    ptx = compiled.asm["ptx"]
    # Constants are compiled in: the entry's parameters are the others, in order.
    constants = {path[0] for path in compiled.src.constants}
    kept = [name for index, name in enumerate(parameters) if index not in constants]
    loads, stores = access_widths(ptx, kept)
    resources = _resource_usage(compiled.asm["cubin"])
    return Launch(
        kernel=compiled.metadata.name,
        grid=tuple(grid),
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        registers=resources["REG"],
        local_bytes=resources["STACK"] + resources["LOCAL"],
        loads=loads,
        stores=stores,
        tensor_core_instructions=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma|tcgen05\.mma)", ptx)),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}


_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);")
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"\[\s*\w+_param_(\d+)\s*\]")


def access_widths(
    ptx: str, parameters: list[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The widths in bytes of global loads and of global stores, by the pointer they go through.

    An address is followed back through the registers that it is computed from, to the pointers
    among the kernel's parameters.
    """
    sources: dict[str, set[str]] = {}
    accesses: list[tuple[bool, str, int]] = []
    pointers = {
        f"param {index}" for index in map(int, re.findall(r"\.ptr \.global .*_param_(\d+)", ptx))
    }
    for line in ptx.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        operation, operands = match.groups()
        parts = operation.split(".")
        if operation.startswith("ld.param"):
            found = _PARAMETER.search(operands)
            if found is not None:
                sources.setdefault(_REGISTER.findall(operands)[0], set()).add(
                    f"param {found.group(1)}"
                )
        elif operation.startswith("cp.async") and "global" in parts:
            address = _REGISTER.findall(operands)[1]
            accesses.append((True, address, int(operands.split(",")[2].strip(), 0)))
        elif parts[0] in ("ld", "st") and "global" in parts:
            address = _REGISTER.findall(operands[operands.index("[") :])[0]
            accesses.append((parts[0] == "ld", address, _width(parts)))
        elif parts[0] not in ("ld", "st"):
            registers = _REGISTER.findall(operands)
            for target in registers[:1]:
                sources.setdefault(target, set()).update(registers[1:])
    widths: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})
    for is_load, address, width in accesses:
        for pointer in _reached(address, sources) & pointers:
            name = parameters[int(pointer.removeprefix("param "))]
            widths[0 if is_load else 1].setdefault(name, set()).add(width)
    loads, stores = ({name: tuple(sorted(w)) for name, w in side.items()} for side in widths)
    return loads, stores


def _width(parts: list[str]) -> int:
    count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
    return count * int(parts[-1][1:]) // 8


def _reached(start: str, sources: dict[str, set[str]]) -> set[str]:
    seen, waiting = {start}, [start]
    while waiting:
        new = sources.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen
