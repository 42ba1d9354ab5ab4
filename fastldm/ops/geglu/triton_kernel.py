"""GEGLU on a GPU: every element read once, every result written once.

A program has a tile of rows and columns. The rows of hidden_states are [value | gate] of D columns
each, however far apart; a tile takes the same columns of both halves. With the normal
distribution Φ and its density φ, of u = gate and the upstream gradient g::

    y = value·u·Φ(u)        d value = g·u·Φ(u)        d gate = g·value·(Φ(u) + u·φ(u))
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastldm.ops._triton import LAUNCH_OPTIONS, on_device_of

TILE_BYTES = 2048  # of each half, to a program: 16 for each of 128 threads
_NUM_WARPS = 4
_NARROWEST = 64


@triton.jit
def _tile(rows, D, blocks_d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row [BLOCK_R, 1], column [1, BLOCK_D] and whether they are there, of this program."""
    r = (tl.program_id(0) // blocks_d).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    return r[:, None], d[None, :], (r < rows)[:, None] & (d < D)[None, :]


@triton.jit
def _distribution(u):
    return 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)


@triton.jit
def _geglu_fwd_kernel(
    hidden_ptr, y_ptr, rows, D, blocks_d, hidden_stride,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r, d, mask = _tile(rows, D, blocks_d, BLOCK_R, BLOCK_D)
    at = hidden_ptr + r * hidden_stride + d
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(at + D, mask=mask, other=0.0).to(tl.float32)
    y = value * (u * _distribution(u))
    tl.store(y_ptr + r * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_bwd_kernel(
    grad_ptr, hidden_ptr, dhidden_ptr, rows, D, blocks_d, grad_stride, hidden_stride,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r, d, mask = _tile(rows, D, blocks_d, BLOCK_R, BLOCK_D)
    at = hidden_ptr + r * hidden_stride + d
    g = tl.load(grad_ptr + r * grad_stride + d, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(at + D, mask=mask, other=0.0).to(tl.float32)
    distribution = _distribution(u)
    density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    dtype = dhidden_ptr.dtype.element_ty
    to = dhidden_ptr + r * (2 * D) + d
    tl.store(to, (g * (u * distribution)).to(dtype), mask=mask)
    tl.store(to + D, (g * (value * (distribution + u * density))).to(dtype), mask=mask)


def geglu_fwd(hidden_states: Tensor) -> Tensor:
    """[..., 2·D] → [..., D], contiguous."""
    width = hidden_states.shape[-1] // 2
    y = hidden_states.new_empty((*hidden_states.shape[:-1], width))
    if not y.numel():
        return y
    hidden, stride = _rows(hidden_states)
    rows, blocks, tile = _cut(y)
    with on_device_of(hidden_states):
        _geglu_fwd_kernel[(blocks[0] * blocks[1],)](
            hidden, y, rows, width, blocks[1], stride,
            BLOCK_R=tile[0], BLOCK_D=tile[1], num_warps=_NUM_WARPS, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return y


def geglu_bwd(grad_y: Tensor, hidden_states: Tensor) -> Tensor:
    """The gradient of hidden_states, contiguous."""
    gradient = hidden_states.new_empty(hidden_states.shape)
    if not gradient.numel():
        return gradient
    hidden, stride = _rows(hidden_states)
    grad, grad_stride = _rows(grad_y)
    rows, blocks, tile = _cut(grad_y)
    with on_device_of(hidden_states):
        _geglu_bwd_kernel[(blocks[0] * blocks[1],)](
            grad, hidden, gradient, rows, grad_y.shape[-1], blocks[1], grad_stride, stride,
            BLOCK_R=tile[0], BLOCK_D=tile[1], num_warps=_NUM_WARPS, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return gradient


def _cut(y: Tensor) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Rows; how many tiles they make along rows and columns; rows and columns of a tile."""
    width = y.shape[-1]
    rows = y.numel() // width
    block_r, block_d = tile_of(width, y.itemsize)
    return rows, (-(-rows // block_r), -(-width // block_d)), (block_r, block_d)


def tile_of(width: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a tile: of those as large, one that pads the columns least."""
    elements = TILE_BYTES // itemsize
    candidates = [_NARROWEST << k for k in range((elements // _NARROWEST).bit_length())]
    block_d = min(candidates, key=lambda block: (-(-width // block) * block, -block))
    return elements // block_d, block_d


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the stride of its rows, copied where these are not evenly spaced."""
    stride = row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def row_stride(x: Tensor) -> int | None:
    """Of [..., width] as [rows, width] with neighbouring elements; None where it is no such."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    stride, rows = x.shape[-1], 1
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != stride * rows:
            return None
        rows *= size
    return stride
