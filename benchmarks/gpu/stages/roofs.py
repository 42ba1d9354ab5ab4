"""What the device can do: the bandwidth of a large copy, and the rates of large matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import copy_of_bytes
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context

_COPIES = (2**33, 2**30, 2**26, 2**23)
"""Bytes read and written in all; the first is the roof."""
_SIDE = 8192
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def run(context: Context) -> Iterator[Row]:
    clock = clock_for(context.device)
    for size in _sizes(context):
        with clock.on_stream():
            copy, source = copy_of_bytes(size, context.device)
            assert torch.equal(copy()[0], source)
        times = clock.times({"copy": copy})["copy"]
        yield {
            "what": "copy",
            "bytes": size,
            "cold_us": times.cold * 1e6,
            "warm_us": times.warm * 1e6,
            "bytes_per_second": size / times.cold,
        }
    side = 64 if context.is_dry else _SIDE
    for dtype in _DTYPES:
        with clock.on_stream():
            a, b = (torch.randn(side, side, device=context.device).to(dtype) for _ in range(2))
        times = clock.times({"product": lambda a=a, b=b: a @ b})["product"]
        yield {
            "what": "matrix product",
            "dtype": str(dtype).removeprefix("torch."),
            "side": side,
            "us": times.warm * 1e6,
            "flops_per_second": 2 * side**3 / times.warm,
        }


def _sizes(context: Context) -> tuple[int, ...]:
    """Of copies, as far as the device holds them and what checks them."""
    if context.is_dry:
        return (2**16,)
    memory = torch.cuda.get_device_properties(0).total_memory
    return tuple(size for size in _COPIES if 2 * size < memory)
