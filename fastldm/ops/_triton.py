"""Triton: whether it can serve here, and what every launch of its kernels shares."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Given with every launch: a·b + c is rounded once, whichever is Triton's default."""

SHARED_BYTES = 166912
"""Shared memory that one block can have on an A100, which stands for a GPU that is not there."""


def problem() -> str | None:
    """Why Triton kernels cannot run on CUDA tensors here; None where they can."""
    if not _is_installed():
        return "triton is not installed; install it with: pip install triton"
    if interprets():
        return "TRITON_INTERPRET is set, and the interpreter serves CPU tensors"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which is for tests: it takes CPU tensors.

    Triton reads the variable when a kernel's module is imported, so set it before the first call.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of `x`, where Triton would take the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that one block can have."""
    if device.type != "cuda":
        return SHARED_BYTES
    # Any: torch's stubs before 2.15 leave this property out.
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def device_key(device: torch.device) -> str:
    """The name of a device in tables of what was measured."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
