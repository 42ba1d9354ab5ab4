"""What the compile gate compiles: one file an operator, each with a function ``cases()``.

One whose kernels are no Triton kernels has instead ``section()``, which gives its part of the page
and what is wrong with the kernels, and ``unavailable()``, the reason why they cannot be compiled
here, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call of a launcher at a size that models have."""

    name: str
    call: Callable[[], Any]
    """Runs the launcher on tensors of the device "meta"."""
    minimum_bytes: int
    """Each input read once and each output written once."""
    moved_bytes: int
    """What the kernels load and store in global memory, scratch included."""
    wide: tuple[str, ...] = ()
    """Pointer arguments that no kernel accesses in less than 16 bytes a thread."""
    tensor_cores: tuple[str, ...] = ()
    """Kernels that must use tensor-core instructions."""
