"""The codebook lookup at the sizes of the paper's first stages, against cdist + argmin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import OURS, Case, Contest, measure_all
from benchmarks.gpu.peers import COMPILED, backend_of, compiled
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import ops

CDIST = "cdist + argmin"

# Latents, depth, codes: one 256² image of f = 2, 4, 8, 16, 32, batches, few codes, wide latents.
SIZES = [
    (16384, 2, 2048), (4096, 3, 8192), (16384, 3, 8192), (1024, 4, 16384), (4096, 4, 16384),
    (65536, 4, 256), (256, 8, 16384), (1024, 8, 16384), (64, 16, 16384), (4096, 256, 1024),
]  # fmt: skip
DRY = [(64, 3, 40)]
COMPILE_SIZES = {(16384, 3, 8192), (4096, 256, 1024)}
_ROWS_CHECKED = 4096


def run(context: Context) -> Iterator[Row]:
    cases = (_case(context, size) for size in (DRY if context.is_dry else SIZES))
    yield from measure_all(cases, clock_for(context.device))


def _case(context: Context, size: tuple[int, int, int]) -> Case:
    latents, depth, codes = size
    # z, the codebook; z_q and the indices.
    count = 4 * (2 * latents * depth + codes * depth) + 8 * latents
    return Case(
        f"N={latents} D={depth} K={codes} float32",
        count,
        lambda: _contest(context, size),
        flops=2.0 * latents * codes * depth,
        rate="float32",
        is_target=True,
    )


def _contest(context: Context, size: tuple[int, int, int]) -> Contest:
    latents, depth, codes = size
    width = min(latents, 64)
    z = torch.randn(1, depth, latents // width, width, device=context.device)
    codebook = torch.randn(codes, depth, device=context.device)
    rows = z.movedim(1, -1).flatten(0, -2)
    backend = backend_of("vector_quantize", context.device)

    def fused() -> Sequence[Tensor]:
        with ops.backend(backend):
            found = ops.vector_quantize(z, codebook)
        return found.indices, found.z_q

    def by_cdist() -> Sequence[Tensor]:
        return _looked_up(z, codebook, torch.cdist(_rows(z), codebook).argmin(1))

    def expanded(z: Tensor, codebook: Tensor) -> Sequence[Tensor]:
        rows = _rows(z)
        squares = rows.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return _looked_up(z, codebook, (squares - 2 * rows @ codebook.T).argmin(1))

    contestants: dict[str, Callable[[], Sequence[Tensor]]] = {
        OURS: fused, CDIST: by_cdist, "expanded matrix": lambda: expanded(z, codebook),
    }  # fmt: skip
    left_out = {}
    if size in COMPILE_SIZES:
        matrix = compiled(expanded)
        contestants[COMPILED] = lambda: matrix(z, codebook)
    else:
        left_out[COMPILED] = "compiled at a few sizes alone"

    def check(name: str, found: Sequence[Tensor]) -> None:
        indices, z_q = found
        assert torch.equal(z_q, codebook[indices].movedim(-1, 1)), "z_q is not the chosen codes"
        wide = rows[:_ROWS_CHECKED].double()
        distances = torch.cdist(wide, codebook.double()).square()
        chosen = distances.gather(1, indices.flatten()[:_ROWS_CHECKED, None])[:, 0]
        # As near as the nearest, but for the rounding of float32; the expanded form cancels.
        slack = 1e-4 if name == OURS else 1e-2
        least = distances.amin(1)
        assert (chosen <= least * (1 + slack) + slack**2).all(), "a nearer code was missed"

    return Contest(contestants, check, left_out)


def _rows(z: Tensor) -> Tensor:
    return z.movedim(1, -1).flatten(0, -2)


def _looked_up(z: Tensor, codebook: Tensor, indices: Tensor) -> Sequence[Tensor]:
    """As the operator gives them: indices without the channels, and their codes in z's shape."""
    shaped = indices.view(z.shape[0], *z.shape[2:])
    return shaped, codebook[shaped].movedim(-1, 1)
