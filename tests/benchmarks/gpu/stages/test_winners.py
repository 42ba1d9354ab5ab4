"""The classes that dispatch reads hold what SDPA won, and nothing else."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from benchmarks.gpu.stages.winners import AXES, classes_of, joined
from fastldm.ops.cross_attention import winners

GRID = {"queries": (64, 1024, 4096), "keys": (1, 77, 256), "channels": (40, 64, 160)}
CELLS = list(product(range(3), repeat=3))


def _is_won(classes: list[winners.Class], *sizes: int, dtype: torch.dtype = torch.float16) -> bool:
    queries, keys, channels = sizes
    q = torch.empty(1, queries, 1, channels, dtype=dtype, device="meta")
    k = torch.empty(1, keys, 1, channels, dtype=dtype, device="meta")
    return winners.is_one_of(tuple(classes), q, k)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_lost_cells_and_no_others(share: float) -> None:
    chosen = random.Random(share)
    lost = {cell for cell in CELLS if chosen.random() < share}
    classes = classes_of("float16", lost, GRID)
    for cell in CELLS:
        sizes = [GRID[axis][place] for axis, place in zip(AXES, cell, strict=True)]
        assert _is_won(classes, *sizes) == (cell in lost)
    if share == 1.0:
        assert len(classes) == 1


def test_a_size_between_two_counts_as_the_larger_one() -> None:
    classes = classes_of("float16", {(1, 1, 1)}, GRID)
    assert classes == [
        {"dtypes": ["float16"], "queries": [65, 1024], "keys": [2, 77], "channels": [41, 64]}
    ]
    assert _is_won(classes, 65, 2, 41)
    assert not _is_won(classes, 64, 2, 41)
    assert not _is_won(classes, 65, 78, 41)
    assert not _is_won(classes, 65, 2, 41, dtype=torch.float32)


def test_beyond_the_largest_nobody_measured() -> None:
    classes = classes_of("float16", set(CELLS), GRID)
    assert _is_won(classes, 1, 1, 1)
    assert not _is_won(classes, 4097, 1, 40)


def test_classes_of_several_dtypes_are_joined() -> None:
    lost = {(0, 0, 0), (2, 2, 2)}
    classes = [*classes_of("float16", lost, GRID), *classes_of("bfloat16", {(2, 2, 2)}, GRID)]
    dtypes = sorted(found["dtypes"] for found in joined(classes))
    assert dtypes == [["float16"], ["float16", "bfloat16"]]
