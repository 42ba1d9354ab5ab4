"""Who computes: the backend of ours that a device has, and compiled plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastldm.ops import _triton

COMPILED = "torch.compile"
_C = TypeVar("_C", bound=Callable[..., Any])

_TRITON = ("group_norm_silu", "cross_attention", "diffusion_step", "geglu")


def backend_of(operator: str, device: str) -> str:
    """The kernel that is measured: asked for by name, so that nothing else steps in."""
    if operator not in _TRITON:
        return "cpp"
    return "triton" if device == "cuda" or _triton.interprets() else "reference"


def compiled(function: _C) -> _C:
    """Compiled anew for one shape."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
