"""Memory while benchmarks run: pages that are warm for all contestants alike."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
"""Parameters of mallopt as glibc numbers them in malloc.h."""
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, as a training loop or a sampler does in the long run.

    By default glibc maps a large tensor afresh at each call and unmaps it after; the kernel then
    clears its pages one fault at a time, which takes longer than the work on them and varies
    several times more. False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
