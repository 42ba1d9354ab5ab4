"""A guided DDIM step, and one that draws noise, against plain torch, compiled, and a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import OURS, Case, Contest, check_against, measure_all, with_copy
from benchmarks.gpu.peers import COMPILED, backend_of, compiled
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import ops

Shape = tuple[int, ...]

# Of one image and of batches; the last ones are large enough for bandwidth to be what counts.
SHAPES: list[Shape] = [
    (1, 4, 64, 64), (8, 4, 64, 64), (1, 16, 128, 128), (64, 4, 128, 128), (64, 16, 128, 128),
]  # fmt: skip
DRY: list[Shape] = [(2, 4, 4, 4)]
_LARGE = 2**25
"""Bytes moved from which the target is set."""
_SCALE = 7.5
_ALPHA, _ALPHA_PREV, _ETA = 0.4, 0.7, 0.5


def run(context: Context) -> Iterator[Row]:
    shapes = DRY if context.is_dry else SHAPES
    dtypes = (torch.float32,) if context.is_dry else (torch.float16, torch.float32)
    cases = (
        _case(context, shape, dtype, draws)
        for dtype in dtypes
        for shape in reversed(shapes)
        for draws in (False, True)
    )
    yield from measure_all(cases, clock_for(context.device))


def _case(context: Context, shape: Shape, dtype: torch.dtype, draws: bool) -> Case:
    # The sample and both outputs of the model; the next sample and x₀.
    count = 5 * math.prod(shape) * dtype.itemsize
    kind = "with noise of a seed" if draws else "without noise"
    name = f"{list(shape)} {str(dtype).removeprefix('torch.')} {kind}"

    def prepare() -> Contest:
        contest = _contest(context, shape, dtype, draws)
        return with_copy(contest, count, context.device)

    is_target = context.is_dry or count >= _LARGE
    return Case(name, count, prepare, is_target=is_target)


def _formula(
    sample: Tensor, conditional: Tensor, unconditional: Tensor, row: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A guided step as samplers write it."""
    root_alpha, root_beta, root_alpha_prev, direction, sigma = row.to(sample.dtype).unbind()
    epsilon = unconditional + _SCALE * (conditional - unconditional)
    original = (sample - root_beta * epsilon) / root_alpha
    previous = root_alpha_prev * original + direction * epsilon
    return (previous if noise is None else previous + sigma * noise), original


def _contest(context: Context, shape: Shape, dtype: torch.dtype, draws: bool) -> Contest:
    device = context.device
    sample, conditional, unconditional = (
        torch.randn(shape, device=device).to(dtype) for _ in range(3)
    )
    row = ops.ddim_coefficients(torch.tensor(_ALPHA), torch.tensor(_ALPHA_PREV), _ETA).to(device)
    options: dict[str, Any] = {"model_output_uncond": unconditional, "guidance_scale": _SCALE}
    if draws:
        # As tensors, which a captured graph reads at every replay.
        options["seed"] = torch.tensor([11], device=device)
        options["offset"] = torch.tensor(3, device=device)
    backend = backend_of("diffusion_step", device)

    def fused() -> tuple[Tensor, ...]:
        with ops.backend(backend):
            return tuple(ops.ddim_step(sample, conditional, row, **options))

    operands = (sample, conditional, unconditional)
    with ops.backend("reference"):
        exact = ops.ddim_step(
            sample.double(), conditional.double(), row.double(),
            model_output_uncond=unconditional.double(), guidance_scale=_SCALE,
            **({"seed": options["seed"], "offset": options["offset"]} if draws else {}),
        )  # fmt: skip
        same_dtype = ops.ddim_step(sample, conditional, row, **options)
    contestants: dict[str, Callable[[], tuple[Tensor, ...]]] = {OURS: fused}
    left_out = {}
    if draws:
        # Its numbers are others, so it is held against the same step without noise.
        left_out["eager"] = left_out[COMPILED] = "it draws other numbers"
    else:
        contestants["eager"] = lambda: _formula(*operands, row, None)
        if device == "cuda":
            step = compiled(_formula)
            contestants[COMPILED] = lambda: step(*operands, row, None)
        else:
            left_out[COMPILED] = "in a dry run"
        same_dtype = contestants["eager"]()
    return Contest(contestants, check_against(exact, same_dtype), left_out)
