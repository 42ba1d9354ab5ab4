"""How the Triton kernels cut queries, keys and channels into tiles and programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUM_BLOCK = 1024
_MOST_ROWS = 64
_SMALLEST = 16  # what the tensor cores take
_PROGRAMS = 264  # two for each multiprocessor of an H100


@dataclass(frozen=True)
class ByQueries:
    """A program for each block of `rows` queries, with all keys."""

    rows: int
    keys: tuple[int, ...]
    widths: tuple[int, ...]
    num_warps: int


@dataclass(frozen=True)
class ByKeys:
    """A program for each tile of keys, part of the channels and `span` queries."""

    rows: int
    keys: tuple[int, ...]
    tiles: int
    widths: tuple[int, ...]
    part_widths: tuple[int, ...]
    parts: int
    span: int
    splits: int
    num_warps: int


def by_queries(Lq: int, Lk: int, D: int, dtype: torch.dtype) -> ByQueries:
    """For the kernels that take a block of queries: their scores and output are in registers."""
    keys, widths = _tiles(Lk, 64), _tiles(D, 128)
    if dtype != torch.float32 and sum(keys) + sum(widths) <= 176:
        return ByQueries(_block(Lq, _MOST_ROWS), keys, widths, num_warps=4)
    if dtype != torch.float32 and sum(keys) <= 80 and sum(widths) > 128:
        return ByQueries(_block(Lq, _MOST_ROWS), _tiles(Lk, 32), widths, num_warps=4)
    # The warps share a row's keys and channels, so these are in tiles that are wide enough for all.
    keys = (_block(Lk, 64),) * -(-Lk // 64)
    widths = _tiles(D, 128) if D > 128 else (_block(D, 128),)
    rows = 32 if dtype != torch.float32 and sum(widths) <= 64 else 16
    return ByQueries(_block(Lq, min(rows, _MOST_ROWS)), keys, widths, num_warps=8)


def by_keys(B: int, Lq: int, H: int, Lk: int, D: int, dtype: torch.dtype) -> ByKeys:
    """For the kernel that takes a tile of keys: their gradients are in registers."""
    widths = _tiles(D, 128)
    channels = sum(widths)
    rows, keys, part_widths, num_warps = 32, _block(Lk, 64), widths, 4
    if dtype == torch.float32:
        rows, keys, num_warps = 16, 16, 1 if channels <= 64 else 4
        part_widths = widths if channels <= 32 else (32,)
    elif channels > 96:
        rows, part_widths = 16, (64,)
    rows = min(rows, _MOST_ROWS)
    tiles, parts = -(-Lk // keys), -(-channels // sum(part_widths))
    blocks = -(-Lq // rows)
    splits = min(blocks, -(-_PROGRAMS // (B * H * tiles * parts)))
    span = rows * -(-blocks // splits)
    return ByKeys(rows, (keys,), tiles, widths, part_widths, parts, span, -(-Lq // span), num_warps)


def _block(size: int, largest: int) -> int:
    """The power of two that holds `size`, within what a tile can be."""
    return min(largest, max(_SMALLEST, _power_of_two(size)))


def _tiles(size: int, largest: int) -> tuple[int, ...]:
    """Powers of two, each but the last as large as the first, that hold `size` with little over."""
    first = min(largest, 1 << (size.bit_length() - 1))
    if first < _SMALLEST or size - size // first * first > first // 2:
        first = min(largest, _block(size, largest))
    rest = size - size // first * first
    return (first,) * (size // first) + ((_block(rest, largest),) if rest else ())


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
