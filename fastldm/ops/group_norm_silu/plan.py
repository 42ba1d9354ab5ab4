"""How the Triton kernels cut [B, C, pixels] into tiles and programs.

A group that fits into a tile is read once, by one program. A larger one is split over the pixels:
one launch takes the moments of each piece, a second joins them, a third normalises.

The shapes follow from the sizes; ``plan.json`` has what was found by measuring, by device.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from math import gcd
from pathlib import Path

_NARROWEST = 32  # of a tile, in neighbouring elements: 64 bytes of half precision
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class Whole:
    """Tiles that hold all pixels of one or more groups."""

    groups: int
    block_p: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class Split:
    """Tiles over pixels and channels, without regard to groups."""

    block_p: int
    block_c: int
    span: int
    """Pixels that a program goes through, a multiple of `block_p`."""
    splits: int
    blocks_c: int
    num_warps: int


@dataclass(frozen=True)
class Sizes:
    """What a plan follows from."""

    batch: int
    channels: int
    pixels: int
    num_groups: int
    channels_inner: bool
    itemsize: int

    @property
    def group_channels(self) -> int:
        return self.channels // self.num_groups


@functools.lru_cache(1024)
def whole(kernel: str, device: str, sizes: Sizes) -> Whole | None:
    """Tiles for the kernel that takes groups whole; None where a group does not fit."""
    config = _configs(device)[kernel]
    groups = _groups_in_tile(sizes)
    block_p, block_c = power_of_two(sizes.pixels), power_of_two(groups * sizes.group_channels)
    elements = block_p * block_c
    # Several groups in a tile are told apart by a matrix, [block_c, block_c].
    if elements > config["elements"] or (groups > 1 and block_c > config["block_c"]):
        return None
    num_warps = max(1, min(config["num_warps"], elements // (32 * config["elements_per_thread"])))
    return Whole(groups, block_p, block_c, num_warps)


@functools.lru_cache(1024)
def split(kernel: str, device: str, sizes: Sizes) -> Split:
    """Tiles for a kernel that goes over the pixels."""
    config = _configs(device)[kernel]
    elements = config["elements"]
    if sizes.channels_inner:
        block_c = _block(sizes.channels, config["block_c"])
        block_p = min(power_of_two(sizes.pixels), elements // block_c)
    else:
        block_p = _block(sizes.pixels, elements)
        block_c = min(power_of_two(sizes.channels), elements // block_p)
    blocks_c = _ceil_div(sizes.channels, block_c)
    columns = max(1, sizes.batch * blocks_c)
    # Enough programs to fill a GPU; beyond that, as much work for each as pays for its start.
    fewest = _ceil_div(config["programs"], columns)
    span = min(config["work"] // block_c, _ceil_div(sizes.pixels, fewest))
    span = _ceil_div(max(span, 1), block_p) * block_p
    return Split(
        block_p, block_c, span, _ceil_div(sizes.pixels, span), blocks_c, config["num_warps"]
    )


def combining(sizes: Sizes, cut: Split) -> tuple[int, int]:
    """Pieces and channels of the tiles in which the pieces' sums are joined."""
    block_c = power_of_two(sizes.group_channels)
    return max(1, min(power_of_two(cut.splits), 1024 // block_c)), block_c


@functools.cache
def _configs(device: str) -> dict[str, dict[str, int]]:
    table = json.loads(Path(__file__).with_name("plan.json").read_text(encoding="utf-8"))
    measured = table.get(device, {})
    return {
        kernel: {**base, **measured.get(kernel, {})} for kernel, base in table["default"].items()
    }


def _groups_in_tile(sizes: Sizes) -> int:
    """With neighbouring channels, as many as begin at a vector and are wide enough to coalesce."""
    if not sizes.channels_inner:
        return 1
    vector = _VECTOR_BYTES // sizes.itemsize
    groups = vector // gcd(sizes.group_channels, vector)
    while groups * sizes.group_channels < _NARROWEST and groups < sizes.num_groups:
        groups *= 2
    return min(groups, sizes.num_groups)


def _block(size: int, limit: int) -> int:
    """The power of two up to `limit` that pads `size` least, and of these the largest."""
    limit = min(power_of_two(size), limit)
    narrowest = min(_NARROWEST, limit)
    candidates = [1 << k for k in range(narrowest.bit_length() - 1, limit.bit_length())]
    return min(candidates, key=lambda block: (_ceil_div(size, block) * block, -block))


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
