"""A changed plan still covers every query once."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.gpu.stages import attention_tuning
from fastldm.ops.cross_attention import plan


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size", attention_tuning.SIZES, ids=str)
def test_candidates_cover_every_query(size: tuple[int, ...], direction: str) -> None:
    B, Lq, Lk, H, D = size
    rule = getattr(plan, direction)
    before = rule(B, Lq, H, Lk, D, torch.float16)
    names = list(attention_tuning.CANDIDATES)
    for values in product(*attention_tuning.CANDIDATES.values()):
        with attention_tuning.planned(direction, dict(zip(names, values, strict=True))):
            cut = getattr(plan, direction)(B, Lq, H, Lk, D, torch.float16)
        assert (cut.rows, cut.num_warps, cut.is_kept) == values[:3]
        assert cut.span % cut.rows == 0
        assert (cut.splits - 1) * cut.span < Lq <= cut.splits * cut.span
        assert cut.splits <= max(1, round(before.splits * values[3]))
    assert getattr(plan, direction) is rule


def test_no_change_is_the_same_plan() -> None:
    for size, direction in product(attention_tuning.SIZES, ("forward", "backward")):
        B, Lq, Lk, H, D = size
        arguments = (B, Lq, H, Lk, D, torch.float16)
        before = getattr(plan, direction)(*arguments)
        with attention_tuning.planned(direction, {}):
            assert getattr(plan, direction)(*arguments) == before
