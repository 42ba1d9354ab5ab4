"""How the Triton kernels cut queries, keys and channels into tiles and programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUM_BLOCK = 1024
_MOST_ROWS = 64
_SMALLEST = 16  # what the tensor cores take
_KEPT_BYTES = 98304
# Warps that a GPU is to have, for each of the 132 multiprocessors of an H100.
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


def forward(B: int, Lq: int, H: int, Lk: int, D: int, dtype: torch.dtype) -> Plan:
    """For the output: scores and output of a block of queries are in registers."""
    keys, widths = _tiles(Lk, 64), _tiles(D, 128)
    rows, num_warps = 64, 4
    if dtype == torch.float32 or sum(keys) + sum(widths) > 176:
        # The warps share a row's keys and channels, so these are in tiles wide enough for all.
        keys = (_block(Lk, 64),) * -(-Lk // 64)
        widths = _tiles(D, 128) if D > 128 else (_block(D, 128),)
        rows, num_warps = 32 if dtype != torch.float32 and sum(widths) <= 64 else 16, 8
    programs = B * H, _FORWARD_WARPS // num_warps
    return _plan(Lq, rows, keys, widths, widths, num_warps, dtype, *programs)


def backward(B: int, Lq: int, H: int, Lk: int, D: int, dtype: torch.dtype) -> Plan:
    """For the gradients: those of all keys are in registers, too."""
    keys = _tiles(Lk, 64)
    widths = _tiles(D, 128) if D > 128 else (_block(D, 128),)
    part_widths = widths
    rows, num_warps = (32, 4) if sum(widths) <= 64 else (16, 8)
    if sum(widths) > 128:
        part_widths, num_warps = (64,), 4
    parts = -(-sum(widths) // sum(part_widths))
    programs = B * H * parts, _BACKWARD_WARPS // num_warps
    return _plan(Lq, rows, keys, widths, part_widths, num_warps, dtype, *programs)


def _plan(
    Lq: int,
    rows: int,
    keys: tuple[int, ...],
    widths: tuple[int, ...],
    part_widths: tuple[int, ...],
    num_warps: int,
    dtype: torch.dtype,
    others: int,
    programs: int,
) -> Plan:
    """With so many splits that they and what else is apart make this many programs."""
    rows = _block(Lq, min(rows, _MOST_ROWS))
    blocks = -(-Lq // rows)
    span = rows * -(-blocks // min(blocks, -(-programs // others)))
    is_kept = 2 * sum(keys) * sum(widths) * dtype.itemsize <= _KEPT_BYTES
    return Plan(rows, keys, widths, part_widths, is_kept, span, -(-Lq // span), num_warps)


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
