"""GroupNorm + SiLU, forward and backward, against eager, torch.compile and a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import OURS, Case, Contest, check_against, measure_all, with_copy
from benchmarks.gpu.peers import COMPILED, backend_of, compiled
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import ops

Shape = tuple[int, int, int, int]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of a decoder of 512² images, and as many pixels with the channels of a UNet.
VAE: list[Shape] = [
    (1, 128, 512, 512), (1, 256, 512, 512), (1, 256, 256, 256), (1, 512, 256, 256),
    (1, 512, 128, 128), (1, 512, 64, 64), (1, 320, 256, 256), (1, 640, 256, 256),
    (1, 960, 128, 128), (1, 1280, 128, 128), (1, 1920, 128, 128), (1, 2560, 128, 128),
]  # fmt: skip
# Of Stable Diffusion 1.5 at 512² with guidance, concatenations included.
UNET: list[Shape] = [
    (2, 320, 64, 64), (2, 640, 64, 64), (2, 960, 64, 64), (2, 640, 32, 32), (2, 960, 32, 32),
    (2, 1280, 32, 32), (2, 1920, 32, 32), (2, 1280, 16, 16), (2, 1920, 16, 16), (2, 2560, 16, 16),
    (2, 1280, 8, 8), (2, 2560, 8, 8),
]  # fmt: skip
DRY: list[Shape] = [(1, 64, 4, 4)]
COMPILE_SHAPES = {(1, 128, 512, 512), (1, 512, 128, 128), (2, 320, 64, 64)}
"""Compiling takes a few seconds a case."""
GROUPS = 32
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def run(context: Context) -> Iterator[Row]:
    yield from measure_all(_cases(context), clock_for(context.device))


def _cases(context: Context) -> Iterator[Case]:
    # What the target is set for comes first.
    for shape in DRY if context.is_dry else VAE:
        for backward in (False, True):
            yield _case(context, shape, torch.float16, "channels_last", backward, is_target=True)
    if context.is_dry:
        return
    for layout, shapes in (("channels_last", UNET), ("contiguous", VAE + UNET)):
        for shape in shapes:
            for backward in (False, True):
                yield _case(context, shape, torch.float16, layout, backward)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in sorted(COMPILE_SHAPES):
            for backward in (False, True):
                yield _case(context, shape, dtype, "channels_last", backward)


def _case(
    context: Context,
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    backward: bool,
    is_target: bool = False,
) -> Case:
    # Forward x and y; backward the gradient of y, x and its gradient.
    count = (3 if backward else 2) * math.prod(shape) * dtype.itemsize
    direction = "backward" if backward else "forward"
    name = f"{list(shape)} {str(dtype).removeprefix('torch.')} {layout} {direction}"

    def prepare() -> Contest:
        contest = _contest(context, shape, dtype, layout, backward)
        return with_copy(contest, count, context.device)

    return Case(name, count, prepare, is_target=is_target)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def _contest(
    context: Context, shape: Shape, dtype: torch.dtype, layout: str, backward: bool
) -> Contest:
    place = {"device": context.device, "dtype": dtype}
    x = torch.randn(shape, **place).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(2, shape[1], **place)
    upstream = torch.randn(shape, **place).contiguous(memory_format=LAYOUTS[layout])
    backend = backend_of("group_norm_silu", context.device)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with ops.backend(backend):
            return ops.group_norm_silu(x, GROUPS, weight, bias)

    def results(norm: Norm, *operands: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        if not backward:
            return lambda: (norm(*operands),)
        leaves = [value.detach().requires_grad_() for value in operands]
        y, gradient = norm(*leaves), upstream.to(operands[0].dtype)
        return lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True)

    operands = (x, weight, bias)
    exact = results(_eager, *(value.double() for value in operands))()
    norms: dict[str, Norm] = {OURS: fused, "eager": _eager}
    left_out = {}
    if shape in COMPILE_SHAPES:
        norms[COMPILED] = compiled(_eager)
    else:
        left_out[COMPILED] = "compiled at a few sizes alone"
    contestants = {name: results(norm, *operands) for name, norm in norms.items()}
    check = check_against(exact, contestants["eager"]())
    return Contest(contestants, check, left_out)
