"""How queries, keys and channels are cut: everything is covered, little is padded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from fastldm.ops.cross_attention import plan

KEYS = [1, 2, 16, 64, 77, 92, 128, 154, 231, 256]
CHANNELS = [3, 8, 32, 40, 48, 64, 72, 80, 96, 128, 160]
DTYPES = [torch.float16, torch.float32]
Rule = Callable[..., plan.Plan]


@pytest.mark.parametrize("rule", [plan.forward, plan.backward])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_key_channel_and_query_is_covered(rule: Rule, dtype: torch.dtype) -> None:
    for keys, channels, queries in product(KEYS, CHANNELS, (1, 16, 63, 4096)):
        cut = rule(2, queries, 8, keys, channels, dtype)
        for tiles, size in ((cut.keys, keys), (cut.widths, channels)):
            assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in tiles)
            # All tiles but the last begin at a multiple of the first one's size.
            assert set(tiles[:-1]) <= {tiles[0]}
            assert tiles[-1] <= tiles[0]
            assert sum(tiles) >= size
            assert sum(tiles) - tiles[-1] < size
        assert len(set(cut.part_widths)) == 1 or cut.part_widths == cut.widths
        assert cut.parts * sum(cut.part_widths) >= channels
        assert (cut.parts - 1) * sum(cut.part_widths) < channels
        assert cut.span % cut.rows == 0
        assert (cut.splits - 1) * cut.span < queries <= cut.splits * cut.span


@pytest.mark.parametrize("rule", [plan.forward, plan.backward])
def test_a_batch_of_two_fills_a_gpu(rule: Rule) -> None:
    """With as many warps as it asks for, where there are blocks enough."""
    for queries, channels in [(4096, 40), (1024, 80), (4096, 64), (256, 160)]:
        cut = rule(2, queries, 8, 77, channels, torch.float16)
        programs = 2 * 8 * cut.parts * cut.splits
        assert programs * cut.num_warps >= 132 * 4 or cut.span == cut.rows


def test_captions_and_the_heads_of_the_unets_are_padded_little() -> None:
    for channels in (40, 64, 80, 160):
        cut = plan.forward(2, 4096, 8, 77, channels, torch.float16)
        assert cut.keys == (64, 16)
        assert sum(cut.widths) <= 1.2 * channels


@pytest.mark.parametrize("rule", [plan.forward, plan.backward])
def test_keys_stay_on_chip_where_auto_relies_on_it(rule: Rule) -> None:
    for keys, channels, dtype in product(KEYS, (32, 40, 64, 80, 128, 160), DTYPES):
        if plan.stays_on_chip(keys, channels, dtype):
            assert rule(2, 4096, 8, keys, channels, dtype).is_kept, (keys, channels, dtype)
    for channels in (40, 64, 80, 160):
        assert plan.stays_on_chip(77, channels, torch.float16)
        # On a GPU whose blocks can have 99 KiB, too.
        assert rule(2, 4096, 8, 77, channels, torch.float16, 101376).is_kept
    assert not rule(2, 4096, 8, 256, 160, torch.float16).is_kept
