"""Where torch's scaled_dot_product_attention wins: the table that dispatch reads, as measured.

DIR/cross_attention_winners.json is fastldm/ops/cross_attention/winners.json with the classes of
this device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import OURS, Case, Contest, measure
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from benchmarks.gpu.stages.cross_attention import SDPA, contest
from fastldm.ops._triton import device_key
from fastldm.ops.cross_attention import winners

AXES = ("queries", "keys", "channels")
GRID: dict[str, tuple[int, ...]] = {
    "queries": (64, 1024, 4096, 16384),
    "keys": (1, 16, 77, 128, 256),
    "channels": (32, 40, 64, 80, 128, 160),
}
DRY_GRID: dict[str, tuple[int, ...]] = {"queries": (4, 8), "keys": (5,), "channels": (16,)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BATCH, _HEADS = 2, 8
_CLEARLY = 0.95
"""SDPA wins where it takes less than this share of the kernel's time."""

Cell = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""The first and the last place on each axis of the grid."""


def run(context: Context) -> Iterator[Row]:
    clock = clock_for(context.device)
    grid = DRY_GRID if context.is_dry else GRID
    classes: list[winners.Class] = []
    for dtype in (torch.float32,) if context.is_dry else DTYPES:
        name = str(dtype).removeprefix("torch.")
        lost: set[Cell] = set()
        for cell in product(*(range(len(grid[axis])) for axis in AXES)):
            sizes = {axis: grid[axis][place] for axis, place in zip(AXES, cell, strict=True)}
            row = measure(_case(context, dtype, sizes), clock)
            times = row["cold_us"]
            if SDPA in times and not times.get(OURS, float("inf")) * _CLEARLY < times[SDPA]:
                lost.add(cell)
            yield {**row, "dtype": name, **sizes}
        classes = joined([*classes, *classes_of(name, lost, grid)])
        # After each dtype, so that what is cut short leaves the others'.
        _write(context.out / "cross_attention_winners.json", context.device, classes)


def _case(context: Context, dtype: torch.dtype, sizes: Mapping[str, int]) -> Case:
    size = (_BATCH, sizes["queries"], sizes["keys"], _HEADS, sizes["channels"])

    def prepare() -> Contest:
        return contest(context.device, size, dtype, backward=False, peers=(SDPA,))

    name = ", ".join(f"{value} {axis}" for axis, value in sizes.items())
    return Case(f"{name}, {str(dtype).removeprefix('torch.')}", 0, prepare)


def classes_of(
    dtype: str, lost: set[Cell], grid: Mapping[str, Sequence[int]]
) -> list[winners.Class]:
    """Classes that hold the lost cells and no others.

    A size between two that were measured counts as the larger one; one beyond the largest as none.
    """
    boxes = [tuple((place, place) for place in cell) for cell in sorted(lost)]
    for axis in range(len(AXES)):
        boxes = _merged(boxes, axis)
    found = []
    for box in boxes:
        sizes = {}
        for axis, (first, last) in zip(AXES, box, strict=True):
            least = grid[axis][first - 1] + 1 if first else 1
            sizes[axis] = [least, grid[axis][last]]
        found.append({"dtypes": [dtype], **sizes})
    return found


def _merged(boxes: list[Box], axis: int) -> list[Box]:
    """Neighbours on an axis that are equal on the others, made one."""
    result: list[Box] = []
    for box in sorted(boxes, key=lambda b: (b[:axis], b[axis + 1 :], b[axis])):
        last = result[-1] if result else None
        if (
            last is not None
            and (last[:axis], last[axis + 1 :]) == (box[:axis], box[axis + 1 :])
            and last[axis][1] + 1 == box[axis][0]
        ):
            result[-1] = (*last[:axis], (last[axis][0], box[axis][1]), *last[axis + 1 :])
        else:
            result.append(box)
    return result


def joined(classes: Sequence[winners.Class]) -> list[winners.Class]:
    """Classes of the same sizes as one, of several dtypes."""
    by_sizes: dict[str, winners.Class] = {}
    for found in classes:
        key = json.dumps([found[axis] for axis in AXES])
        dtypes = by_sizes[key]["dtypes"] if key in by_sizes else []
        by_sizes[key] = {**found, "dtypes": [*dtypes, *found["dtypes"]]}
    return list(by_sizes.values())


def _write(path: Path, device: str, classes: list[winners.Class]) -> None:
    stored = Path(winners.__file__).with_name("winners.json")
    table: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
    table[device_key(torch.device(device))] = classes
    lines = (
        f"  {json.dumps(key)}: [" + ",".join(f"\n    {json.dumps(c)}" for c in found)
        + ("\n  ]" if found else "]")
        for key, found in table.items()
    )  # fmt: skip
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
