"""How tensors of one shape are walked together: as few dimensions as their memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Walk:
    """Element i of a sample is at ``(i // inner_size)·outer + (i % inner_size)·inner``."""

    inner_size: int
    strides: tuple[tuple[int, int, int], ...]
    """(sample, outer, inner) of each tensor."""
    is_flat: bool
    """There is no outer dimension."""


def row_major(shape: torch.Size) -> tuple[int, ...]:
    """Strides that number the elements of a shape, whatever its memory layout."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def walk(result: Tensor, strides: Sequence[tuple[int, ...]]) -> Walk | None:
    """In the order of `result`'s memory; None where its samples have more than two dimensions."""
    dims = [dim for dim in range(1, result.ndim) if result.shape[dim] > 1]
    dims.sort(key=result.stride, reverse=True)
    # (size, stride of each tensor), outermost first.
    merged: list[tuple[int, tuple[int, ...]]] = []
    for dim in dims:
        size, steps = result.shape[dim], tuple(stride[dim] for stride in strides)
        if merged and merged[-1][1] == tuple(size * step for step in steps):
            size *= merged.pop()[0]
        merged.append((size, steps))
    if len(merged) > 2:
        return None
    nothing = (1, (0,) * len(strides))
    _, outer = merged[-2] if len(merged) == 2 else nothing
    inner_size, inner = merged[-1] if merged else nothing
    samples = tuple(stride[0] for stride in strides)
    return Walk(inner_size, tuple(zip(samples, outer, inner, strict=True)), len(merged) < 2)
