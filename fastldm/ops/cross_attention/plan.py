"""How the Triton kernels cut queries, keys and channels into tiles and programs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastldm.ops._triton import SHARED_BYTES

SUM_BLOCK = 1024
_MOST_BYTES, _MOST_FLOAT32_BYTES = 65536, 40000
# What queries, and all that the compiler lays there, take at most; and if they are few.
_BESIDE_KEYS, _BESIDE_KEYS_AND_FEW_QUERIES = 38912, 24576
_MOST_ROWS = 64
_SMALLEST = 16  # what the tensor cores take
# Warps that a GPU is to have, at most: as many as fit at once on the 132 multiprocessors of an
# H100. More would wait for these to end, and each program of a head loads its keys anew.
_FORWARD_WARPS = 132 * 16
_BACKWARD_WARPS = 132 * 8


@dataclass(frozen=True)
class Plan:
    """A program for each `span` queries, `rows` at a time, with all keys of a head."""

    rows: int
    keys: tuple[int, ...]
    widths: tuple[int, ...]
    part_widths: tuple[int, ...]
    """Of the channels whose gradients a program finds; all of them in the forward pass."""
    is_kept: bool
    """Keys and values are loaded once, not for each block of queries."""
    span: int
    splits: int
    num_warps: int

    @property
    def parts(self) -> int:
        """Programs that share the channels of a head."""
        return -(-sum(self.widths) // sum(self.part_widths))

    @property
    def num_stages(self) -> int:
        """Of the software pipeline; the next queries are on their way if keys are not."""
        return 2 if self.is_kept else 1


def stays_on_chip(Lk: int, D: int, dtype: torch.dtype) -> bool:
    """Whether all keys and values of a head do, for which the kernels are made."""
    limit = _MOST_FLOAT32_BYTES if dtype == torch.float32 else _MOST_BYTES
    return 2 * Lk * D * dtype.itemsize <= limit


def forward(
    B: int, Lq: int, H: int, Lk: int, D: int, dtype: torch.dtype, shared_bytes: int = SHARED_BYTES
) -> Plan:
    """For the output: scores and output of a block of queries are in registers."""
    # 40 channels as 32 + 16 would be as few, but Triton 3.8 spills registers of these on sm_100.
    keys, widths = _tiles(Lk, 64), _tiles(D, 16 if 32 < D <= 48 else 128)
    # Four warps one above the other, or all warps side by side in tiles wide enough for them.
    rows, num_warps = 64, 4
    if dtype == torch.float32:
        rows, num_warps = 16, 4 if D <= 64 else 8
        widths = widths if D > 128 else (_block(D, 128),)
    elif sum(keys) > (160 if D <= 64 else 128) or sum(keys) + sum(widths) > 256:
        rows, num_warps = 32 if D <= 128 else 16, 8
        widths = widths if D > 128 else (max(64, _block(D, 128)),)
    cut = Plan(rows, keys, widths, widths, False, rows, 1, num_warps)
    # Keys and values are on chip.
    kept = sum(keys) * 2 * sum(widths) * _bytes_on_chip(dtype)
    return _fitted(cut, Lq, B * H, _FORWARD_WARPS, kept + _BESIDE_KEYS <= shared_bytes)


def backward(
    B: int, Lq: int, H: int, Lk: int, D: int, dtype: torch.dtype, shared_bytes: int = SHARED_BYTES
) -> Plan:
    """For the gradients: those of all keys are in registers, too."""
    keys = _tiles(Lk, 64)
    rows, num_warps, beside = 16, 4 if sum(keys) <= 80 else 8, _BESIDE_KEYS
    if dtype == torch.float32:
        widths = _tiles(D, 128) if D > 64 else (_block(D, 64),)
        part_widths = widths if D <= 32 else (32,)
        if 32 < D <= 64 and sum(keys) <= 80:
            part_widths, num_warps = widths, 8
    elif D <= 32:
        widths = part_widths = (_block(D, 64),)
        rows = 32 if sum(keys) <= 80 else 16
    elif D <= 64:
        widths = part_widths = (64,)
        rows, num_warps = 32 if sum(keys) <= 160 else 16, 8
    elif D <= 128 and sum(keys) <= 80:
        widths = part_widths = (128,)
        num_warps = 8
    else:
        widths, part_widths, beside = (64,) * -(-D // 64), (64,), _BESIDE_KEYS_AND_FEW_QUERIES
    cut = Plan(rows, keys, widths, part_widths, False, rows, 1, num_warps)
    # Keys, values, and keys once more, as ∂q is found from them, are on chip.
    kept = sum(keys) * (2 * sum(widths) + sum(part_widths)) * _bytes_on_chip(dtype)
    return _fitted(cut, Lq, B * H * cut.parts, _BACKWARD_WARPS, kept + beside <= shared_bytes)


def _fitted(cut: Plan, Lq: int, others: int, warps: int, is_kept: bool) -> Plan:
    """With the splits that fill a GPU beside `others`."""
    rows = _block(Lq, min(cut.rows, _MOST_ROWS))
    blocks = -(-Lq // rows)
    span = rows * -(-blocks // min(blocks, max(1, warps // (cut.num_warps * others))))
    return replace(cut, rows=rows, span=span, splits=-(-Lq // span), is_kept=is_kept)


def _bytes_on_chip(dtype: torch.dtype) -> int:
    """Of an element; a float32 is split into two numbers for the tensor cores."""
    return 2 * dtype.itemsize if dtype == torch.float32 else dtype.itemsize


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
