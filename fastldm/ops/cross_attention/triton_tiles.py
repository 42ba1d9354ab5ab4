"""What the forward and backward Triton kernels of cross-attention share: tiles and the softmax.

A matrix is a tuple of tiles next to each other. Their sizes are powers of two, as the tensor cores
want them, and pad little: 77 keys are 64 + 16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# Float32 operands as two tf32 numbers each: the product of the smallest parts alone is left out.
_PRECISION: tl.constexpr = tl.constexpr("tf32x3")
# Of keys, for each block of queries anew: Triton before 3.8 would hold them in registers all the
# time, more than there are. Later ones may spill if they cannot choose.
LOADS_STAY_IN_LOOP: tl.constexpr = tl.constexpr(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
)


@triton.jit
def head_of(ptr, strides, b, h, VECTOR: tl.constexpr):
    return ptr + (b * strides[0] + h * strides[2]) * VECTOR


@triton.jit
def load(
    ptr, strides, rows, in_rows, column, D: tl.constexpr, WIDTHS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Rows of a head from a column on, as tiles of these widths; 0 outside."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        d = column + i * WIDTHS[0] + tl.arange(0, WIDTHS[i])
        at = ptr + rows[:, None] * strides[1] * VECTOR + d[None, :] * strides[3]
        tiles += (tl.load(at, mask=in_rows[:, None] & (d < D)[None, :], other=0.0),)
    return tiles


@triton.jit
def store(
    ptr, tiles, b, h, rows, in_rows, column, L, H, D: tl.constexpr, WIDTHS: tl.constexpr
):  # fmt: skip
    """Tiles into a contiguous [B, L, H, D]."""
    for i in tl.static_range(len(WIDTHS)):
        d = column + i * WIDTHS[0] + tl.arange(0, WIDTHS[i])
        at = ptr + ((b * L + rows[:, None]) * H + h) * D + d[None, :]
        mask = in_rows[:, None] & (d < D)[None, :]
        tl.store(at, tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def attended_keys(key_mask_ptr, mask_strides, b, Lk, KEYS: tl.constexpr):
    """The keys in tiles; which of them are attended to, and how many these are."""
    keys = ()
    keeps = ()
    count = tl.zeros([], tl.int32)
    for j in tl.static_range(len(KEYS)):
        index = j * KEYS[0] + tl.arange(0, KEYS[j]).to(tl.int64)
        keep = index < Lk
        if key_mask_ptr is not None:
            at = key_mask_ptr + b * mask_strides[0] + index * mask_strides[1]
            keep = keep & (tl.load(at, mask=keep, other=0) != 0)
        keys += (index,)
        keeps += (keep,)
        count += tl.sum(keep.to(tl.int32), 0)
    return keys, keeps, count


@triton.jit
def load_keys(
    ptr, strides, keys, keeps, column, D: tl.constexpr, WIDTHS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Keys or values from a column on, in tiles of both; 0 where not attended to."""
    tiles = ()
    for j in tl.static_range(len(keys)):
        tiles += (load(ptr, strides, keys[j], keeps[j], column, D, WIDTHS, VECTOR),)
    return tiles


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles += (tl.full((ROWS, WIDTHS[i]), 0.0, tl.float32),)
    return tiles


@triton.jit
def times(tiles, factor):
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i] * factor,)
    return products


@triton.jit
def times_transposed(a, b):
    """a·bᵀ of operands in tiles of columns."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=_PRECISION)
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=_PRECISION)
    return product


@triton.jit
def add_product(sums, a, b):
    """sums + a·b, with sums and b in tiles of columns."""
    tiles = ()
    for i in tl.static_range(len(sums)):
        tiles += (tl.dot(a, b[i], sums[i], input_precision=_PRECISION),)
    return tiles


@triton.jit
def softmax(q, k, keeps, attended, scale_log2):
    """exp(S − max S) in tiles of keys, and the reciprocal of its sum; 0 if there is no key."""
    scores = ()
    top = tl.full((q[0].shape[0],), float("-inf"), tl.float32)
    for j in tl.static_range(len(k)):
        s = tl.where(keeps[j][None, :], times_transposed(q, k[j]) * scale_log2, float("-inf"))
        scores += (s,)
        top = tl.maximum(top, tl.max(s, 1))
    top = tl.where(attended > 0, top, float("inf"))
    total = tl.zeros_like(top)
    exponentials = ()
    for j in tl.static_range(len(k)):
        e = tl.math.exp2(scores[j] - top[:, None])
        exponentials += (e,)
        total += tl.sum(e, 1)
    return exponentials, 1.0 / tl.where(attended > 0, total, float("inf"))


def vector_of(*operands: Tensor) -> int:
    """How many elements are 16 bytes, if all rows of all operands begin at such a vector; or 1."""
    count = 16 // operands[0].itemsize
    aligned = all(
        t.data_ptr() % 16 == 0 and t.stride(3) == 1 and all(s % count == 0 for s in t.stride()[:3])
        for t in operands
    )
    return count if aligned else 1


def strides_of(t: Tensor, vector: int) -> tuple[int, ...]:
    """Strides, but for the last in vectors: so the compiler sees that they are whole ones."""
    return (*(stride // vector for stride in t.stride()[:3]), t.stride(3))


def mask_strides_of(key_mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if key_mask is None else (key_mask.stride(0), key_mask.stride(1))
