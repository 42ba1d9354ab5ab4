"""GEGLU forward and backward, against plain torch, compiled, and a copy of as many bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import OURS, Case, Contest, check_against, measure_all, with_copy
from benchmarks.gpu.peers import COMPILED, backend_of, compiled
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import ops

Shape = tuple[int, ...]
Gate = Callable[[Tensor], Tensor]

# The levels of Stable Diffusion's UNet at 512² with guidance, and the first one of a batch.
SHAPES: list[Shape] = [(2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240), (16, 4096, 2560)]
DRY: list[Shape] = [(2, 3, 16)]


def run(context: Context) -> Iterator[Row]:
    shapes = DRY if context.is_dry else SHAPES
    cases = (_case(context, shape, backward) for shape in shapes for backward in (False, True))
    yield from measure_all(cases, clock_for(context.device))


def _case(context: Context, shape: Shape, backward: bool) -> Case:
    dtype = torch.float32 if context.is_dry else torch.float16
    halves = 5 if backward else 3
    count = halves * math.prod(shape) // 2 * dtype.itemsize
    direction = "backward" if backward else "forward"
    name = f"{direction}, {list(shape)} {str(dtype).removeprefix('torch.')}"

    def prepare() -> Contest:
        return with_copy(_contest(context, shape, dtype, backward), count, context.device)

    return Case(name, count, prepare, is_target=True)


def _eager(hidden_states: Tensor) -> Tensor:
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _contest(context: Context, shape: Shape, dtype: torch.dtype, backward: bool) -> Contest:
    device = context.device
    hidden = torch.randn(shape, device=device).to(dtype)
    upstream = torch.randn(*shape[:-1], shape[-1] // 2, device=device).to(dtype)
    backend = backend_of("geglu", device)

    def fused(hidden_states: Tensor) -> Tensor:
        with ops.backend(backend):
            return ops.geglu(hidden_states)

    def call(gate: Gate, operand: Tensor) -> Callable[[], Sequence[Tensor]]:
        if not backward:
            return lambda: (gate(operand),)
        leaf = operand.detach().requires_grad_()
        y = gate(leaf)
        return lambda: torch.autograd.grad(y, leaf, upstream.to(y.dtype), retain_graph=True)

    exact = call(_eager, hidden.double())()
    contestants = {OURS: call(fused, hidden), "eager": call(_eager, hidden)}
    left_out = {}
    if context.is_dry:
        left_out[COMPILED] = "in a dry run"
    else:
        contestants[COMPILED] = call(compiled(_eager), hidden)
    return Contest(contestants, check_against(exact, contestants["eager"]()), left_out)
