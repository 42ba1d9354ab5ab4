"""Memory while benchmarks run: pages that are warm for all contestants alike."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
"""Parameters of mallopt as glibc numbers them in malloc.h."""
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed.

    By default glibc maps a large tensor afresh at each call and unmaps it after, one of more than
    32 MB however often it was there; the kernel then clears its pages one fault at a time, which
    takes longer than an operator's work on them, varies several times more, and is no contestant's
    doing. False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes that a call holds at once in torch's memory, beside what was there before.

    What a library allocates by other means is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in found.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = itertools.accumulate(size for _, size in sorted(changes, key=lambda change: change[0]))
    return max(0, *held, 0)
