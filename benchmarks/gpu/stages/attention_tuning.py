"""Tries other plans of the cross-attention kernels at the sizes that models have.

What was faster is in DIR/cross_attention_plans.json, for whoever changes the rules of
fastldm/ops/cross_attention/plan.py by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.candidates import BETTER, Checked, ratios
from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import OURS
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from benchmarks.gpu.stages.cross_attention import Size, contest
from fastldm.ops.cross_attention import plan

# Batch, queries, keys, heads, channels.
SIZES: list[Size] = [
    (2, 4096, 77, 8, 40), (2, 4096, 77, 10, 64), (2, 1024, 77, 8, 80), (2, 1024, 77, 20, 64),
    (2, 256, 77, 8, 160), (2, 4096, 256, 8, 40), (2, 4096, 1, 8, 64),
]  # fmt: skip
DRY: list[Size] = [(1, 32, 5, 1, 16)]
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "rows": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "is_kept": (False, True),
    "splits_by": (0.5, 2.0, 4.0),
}
"""Of a plan, and by how much to multiply its splits."""
DRY_CANDIDATES: dict[str, tuple[Any, ...]] = {"rows": (16,)}


def run(context: Context) -> Iterator[Row]:
    clock = clock_for(context.device)
    dtype = torch.float32 if context.is_dry else torch.float16
    candidates = DRY_CANDIDATES if context.is_dry else CANDIDATES
    faster: list[Row] = []
    for size in DRY if context.is_dry else SIZES:
        for direction in ("forward", "backward"):
            with clock.on_stream():
                found = contest(context.device, size, dtype, direction == "backward", peers=())
                call = Checked(found.contestants[OURS], found.check)
            best: dict[str, Any] = {}
            where = {"size": size, "dtype": str(dtype), "direction": direction}
            for name, values in candidates.items():
                for value in values:
                    candidate = {**best, name: value}
                    measured = ratios(
                        partial(planned, direction, candidate),
                        partial(planned, direction, best),
                        [call],
                        clock,
                    )
                    row = {**where, "candidate": candidate, "against": best}
                    if isinstance(measured, str):
                        yield {**row, "skipped": measured}
                        continue
                    kept = max(measured) < BETTER
                    yield {**row, "ratios": measured, "kept": kept}
                    best = candidate if kept else best
            if best:
                B, Lq, Lk, H, D = size
                with planned(direction, best):
                    better = getattr(plan, direction)(B, Lq, H, Lk, D, dtype)
                faster.append({**where, "changes": best, "plan": asdict(better)})
            text = json.dumps(faster, indent=1)
            (context.out / "cross_attention_plans.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def planned(direction: str, changes: dict[str, Any]) -> Iterator[None]:
    """The plan of one direction with some of its figures changed."""
    rule = getattr(plan, direction)

    def changed(B: int, Lq: int, H: int, Lk: int, D: int, *rest: Any) -> plan.Plan:
        cut: plan.Plan = rule(B, Lq, H, Lk, D, *rest)
        given = {name: value for name, value in changes.items() if name != "splits_by"}
        cut = replace(cut, **given)
        # A span is a whole number of blocks.
        splits = max(1, round(cut.splits * changes.get("splits_by", 1.0)))
        span = cut.rows * -(-Lq // (splits * cut.rows))
        return replace(cut, span=span, splits=-(-Lq // span))

    setattr(plan, direction, changed)
    try:
        yield
    finally:
        setattr(plan, direction, rule)
