"""Cross-attention on a GPU, forward and backward: all keys of a head at once, no online softmax.

A head is few keys, so a program takes a block of queries, its whole row of scores S = scale·q·kᵀ
and their softmax P in one go. Keys and channels are cut into tiles that are powers of two, as the
tensor cores want them, and that pad little: 77 keys are 64 + 16, 40 channels 32 + 16.

The backward keeps nothing but the operands. A first kernel finds P anew and writes, with
∂P = ∂o·vᵀ and δ = rowsum(P∘∂P)::

    ∂q = scale·(P∘(∂P − δ))·k        ℓ = log₂ Σ exp S of each row, and δ

A second one goes through the queries for a tile of keys, transposed, so that nothing has to be::

    Pᵀ = exp(Sᵀ − ℓ)      ∂v = Pᵀ·∂o      ∂k = scale·(Pᵀ∘(∂Pᵀ − δ))·q

Where the queries are split over programs, a third one adds their sums, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.ops._triton import LAUNCH_OPTIONS, on_device_of
from fastldm.ops.cross_attention import plan

_LOG2_E = 1.4426950408889634
# Float32 operands as two tf32 numbers each: the product of the smallest parts alone is left out.
_PRECISION: tl.constexpr = tl.constexpr("tf32x3")


@triton.jit
def _head(ptr, strides, b, h, VECTOR: tl.constexpr):
    return ptr + (b * strides[0] + h * strides[2]) * VECTOR


@triton.jit
def _load(
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
def _store(
    ptr, tiles, b, h, rows, in_rows, column, L, H, D: tl.constexpr, WIDTHS: tl.constexpr
):  # fmt: skip
    """Tiles into a contiguous [B, L, H, D]."""
    for i in tl.static_range(len(WIDTHS)):
        d = column + i * WIDTHS[0] + tl.arange(0, WIDTHS[i])
        at = ptr + ((b * L + rows[:, None]) * H + h) * D + d[None, :]
        mask = in_rows[:, None] & (d < D)[None, :]
        tl.store(at, tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keys(tile, key_mask_ptr, mask_strides, b, Lk, KEYS: tl.constexpr, SIZE: tl.constexpr):
    """The keys of a tile, and which of them are to be attended to."""
    keys = tile * KEYS[0] + tl.arange(0, SIZE).to(tl.int64)
    keep = keys < Lk
    if key_mask_ptr is not None:
        at = key_mask_ptr + b * mask_strides[0] + keys * mask_strides[1]
        keep = keep & (tl.load(at, mask=keep, other=0) != 0)
    return keys, keep


@triton.jit
def _attended(key_mask_ptr, mask_strides, b, Lk, tiles, KEYS: tl.constexpr):
    """How many keys a sample has to attend to."""
    count = tl.zeros([], tl.int32) + Lk
    if key_mask_ptr is not None:
        count = tl.zeros([], tl.int32)
        for tile in range(tiles):
            _, keep = _keys(tile, key_mask_ptr, mask_strides, b, Lk, KEYS, KEYS[0])
            count += tl.sum(keep.to(tl.int32), 0)
    return count


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles += (tl.zeros((ROWS, WIDTHS[i]), tl.float32),)
    return tiles


@triton.jit
def _times(tiles, factor):
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i] * factor,)
    return products


@triton.jit
def _times_transposed(a, b):
    """a·bᵀ of operands in tiles of columns."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=_PRECISION)
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=_PRECISION)
    return product


@triton.jit
def _add_product(sums, a, b):
    """sums + a·b, with sums and b in tiles of columns."""
    tiles = ()
    for i in tl.static_range(len(sums)):
        tiles += (tl.dot(a, b[i], sums[i], input_precision=_PRECISION),)
    return tiles


@triton.jit
def _exponentials(
    q, k_ptr, k_strides, key_mask_ptr, mask_strides, b, Lk, scale_log2,
    D: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """exp(S − max S) in tiles of keys; of each row the reciprocal of their sum, and ℓ.

    Without any key to attend to they are 0, 0 and ∞.
    """
    scores = ()
    top = tl.full((q[0].shape[0],), float("-inf"), tl.float32)
    for j in tl.static_range(len(KEYS)):
        keys, keep = _keys(j, key_mask_ptr, mask_strides, b, Lk, KEYS, KEYS[j])
        k = _load(k_ptr, k_strides, keys, keep, 0, D, WIDTHS, VECTOR)
        s = tl.where(keep[None, :], _times_transposed(q, k) * scale_log2, float("-inf"))
        scores += (s,)
        top = tl.maximum(top, tl.max(s, 1))
    attended = _attended(key_mask_ptr, mask_strides, b, Lk, len(KEYS), KEYS)
    top = tl.where(attended > 0, top, 0.0)
    total = tl.zeros_like(top)
    exponentials = ()
    for j in tl.static_range(len(KEYS)):
        e = tl.math.exp2(scores[j] - top[:, None])
        exponentials += (e,)
        total += tl.sum(e, 1)
    reciprocal = tl.where(attended > 0, 1.0 / total, 0.0)
    logarithm = tl.where(attended > 0, top + tl.math.log2(total), float("inf"))
    return exponentials, reciprocal, logarithm


@triton.jit
def _cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, o_ptr, q_strides, k_strides, v_strides, mask_strides,
    Lq, Lk, H, blocks, scale_log2,
    D: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # Heads are neighbours in memory, so their programs follow each other.
    h = (tl.program_id(0) % H).to(tl.int64)
    block = tl.program_id(0) // H % blocks
    b = (tl.program_id(0) // H // blocks).to(tl.int64)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    q_ptr = _head(q_ptr, q_strides, b, h, VECTOR)
    k_ptr = _head(k_ptr, k_strides, b, h, VECTOR)
    v_ptr = _head(v_ptr, v_strides, b, h, VECTOR)
    q = _load(q_ptr, q_strides, rows, rows < Lq, 0, D, WIDTHS, VECTOR)
    exponentials, reciprocal, _ = _exponentials(
        q, k_ptr, k_strides, key_mask_ptr, mask_strides, b, Lk, scale_log2, D, WIDTHS, KEYS, VECTOR
    )
    o = _zeros(ROWS, WIDTHS)
    for j in tl.static_range(len(KEYS)):
        keys, keep = _keys(j, key_mask_ptr, mask_strides, b, Lk, KEYS, KEYS[j])
        v = _load(v_ptr, v_strides, keys, keep, 0, D, WIDTHS, VECTOR)
        o = _add_product(o, exponentials[j].to(v[0].dtype), v)
    _store(o_ptr, _times(o, reciprocal[:, None]), b, h, rows, rows < Lq, 0, Lq, H, D, WIDTHS)


@triton.jit
def _cross_attention_bwd_query_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, dq_ptr, logarithm_ptr, delta_ptr,
    grad_strides, q_strides, k_strides, v_strides, mask_strides,
    Lq, Lk, H, blocks, scale, scale_log2,
    D: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    h = (tl.program_id(0) % H).to(tl.int64)
    block = tl.program_id(0) // H % blocks
    b = (tl.program_id(0) // H // blocks).to(tl.int64)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    grad_ptr = _head(grad_ptr, grad_strides, b, h, VECTOR)
    q_ptr = _head(q_ptr, q_strides, b, h, VECTOR)
    k_ptr = _head(k_ptr, k_strides, b, h, VECTOR)
    v_ptr = _head(v_ptr, v_strides, b, h, VECTOR)
    q = _load(q_ptr, q_strides, rows, rows < Lq, 0, D, WIDTHS, VECTOR)
    exponentials, reciprocal, logarithm = _exponentials(
        q, k_ptr, k_strides, key_mask_ptr, mask_strides, b, Lk, scale_log2, D, WIDTHS, KEYS, VECTOR
    )
    grad = _load(grad_ptr, grad_strides, rows, rows < Lq, 0, D, WIDTHS, VECTOR)
    delta = tl.zeros((ROWS,), tl.float32)
    dp = ()
    for j in tl.static_range(len(KEYS)):
        keys, keep = _keys(j, key_mask_ptr, mask_strides, b, Lk, KEYS, KEYS[j])
        v = _load(v_ptr, v_strides, keys, keep, 0, D, WIDTHS, VECTOR)
        dp += (_times_transposed(grad, v),)
        delta += tl.sum(exponentials[j] * reciprocal[:, None] * dp[j], 1)
    dq = _zeros(ROWS, WIDTHS)
    for j in tl.static_range(len(KEYS)):
        keys, keep = _keys(j, key_mask_ptr, mask_strides, b, Lk, KEYS, KEYS[j])
        k = _load(k_ptr, k_strides, keys, keep, 0, D, WIDTHS, VECTOR)
        ds = exponentials[j] * reciprocal[:, None] * (dp[j] - delta[:, None])
        dq = _add_product(dq, ds.to(k[0].dtype), k)
    _store(dq_ptr, _times(dq, scale), b, h, rows, rows < Lq, 0, Lq, H, D, WIDTHS)
    at = (b * H + h) * Lq + rows
    tl.store(logarithm_ptr + at, logarithm, mask=rows < Lq)
    tl.store(delta_ptr + at, delta, mask=rows < Lq)


@triton.jit
def _cross_attention_bwd_key_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, logarithm_ptr, delta_ptr, dk_ptr, dv_ptr,
    grad_strides, q_strides, k_strides, v_strides, mask_strides,
    Lq, Lk, B, H, tiles, splits, span, scale, scale_log2,
    D: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    PART_WIDTHS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of a tile of keys and a part of the channels, from `span` queries."""
    h = (tl.program_id(0) % H).to(tl.int64)
    rest = tl.program_id(0) // H
    column = rest % PARTS * PART_WIDTHS[0]
    tile = rest // PARTS % tiles
    split = (rest // PARTS // tiles % splits).to(tl.int64)
    b = (rest // PARTS // tiles // splits).to(tl.int64)
    grad_ptr = _head(grad_ptr, grad_strides, b, h, VECTOR)
    q_ptr = _head(q_ptr, q_strides, b, h, VECTOR)
    keys, keep = _keys(tile, key_mask_ptr, mask_strides, b, Lk, KEYS, KEYS[0])
    k_ptr = _head(k_ptr, k_strides, b, h, VECTOR)
    v_ptr = _head(v_ptr, v_strides, b, h, VECTOR)
    k = _load(k_ptr, k_strides, keys, keep, 0, D, WIDTHS, VECTOR)
    v = _load(v_ptr, v_strides, keys, keep, 0, D, WIDTHS, VECTOR)
    is_single = _attended(key_mask_ptr, mask_strides, b, Lk, tiles, KEYS) == 1
    dk = _zeros(KEYS[0], PART_WIDTHS)
    dv = _zeros(KEYS[0], PART_WIDTHS)
    for start in range(split * span, tl.minimum(Lq, (split + 1) * span), ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        in_rows = rows < Lq
        q = _load(q_ptr, q_strides, rows, in_rows, 0, D, WIDTHS, VECTOR)
        at = (b * H + h) * Lq + rows
        logarithm = tl.load(logarithm_ptr + at, mask=in_rows, other=float("inf"))
        s = tl.where(keep[:, None], _times_transposed(k, q) * scale_log2, float("-inf"))
        p = tl.math.exp2(s - logarithm[None, :])
        grad = _load(grad_ptr, grad_strides, rows, in_rows, 0, D, WIDTHS, VECTOR)
        delta = tl.load(delta_ptr + at, mask=in_rows, other=0.0)
        dp = _times_transposed(v, grad)
        # δ of a single key is ∂P, which must cancel to the last bit.
        ds = p * (dp - tl.where(is_single, dp, delta[None, :]))
        if PARTS > 1:
            q = _load(q_ptr, q_strides, rows, in_rows, column, D, PART_WIDTHS, VECTOR)
            grad = _load(grad_ptr, grad_strides, rows, in_rows, column, D, PART_WIDTHS, VECTOR)
        dv = _add_product(dv, p.to(k[0].dtype), grad)
        dk = _add_product(dk, ds.to(k[0].dtype), q)
    dk = _times(dk, scale)
    b += split * B
    _store(dk_ptr, dk, b, h, keys, keys < Lk, column, Lk, H, D, PART_WIDTHS)
    _store(dv_ptr, dv, b, h, keys, keys < Lk, column, Lk, H, D, PART_WIDTHS)


@triton.jit
def _cross_attention_bwd_sum_kernel(
    dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr, count, splits, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dk = tl.zeros((BLOCK,), tl.float32)
    dv = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        dk += tl.load(dk_parts_ptr + at, mask=at < count, other=0.0)
        dv += tl.load(dv_parts_ptr + at, mask=at < count, other=0.0)
        dk_parts_ptr += count
        dv_parts_ptr += count
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=at < count)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=at < count)


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
) -> Tensor:
    """o, [B, Lq, H, D]."""
    o = q.new_empty(q.shape)
    if not q.numel():
        return o
    B, Lq, H, D = q.shape
    cut = plan.by_queries(Lq, k.shape[1], D, q.dtype)
    vector = _vector(q, k, v)
    blocks = -(-Lq // cut.rows)
    with on_device_of(q):
        _cross_attention_fwd_kernel[(B * blocks * H,)](
            q, k, v, key_mask, o, *(_strides(t, vector) for t in (q, k, v)),
            _mask_strides(key_mask), Lq, k.shape[1], H, blocks, scale * _LOG2_E,
            D=D, WIDTHS=cut.widths, KEYS=cut.keys, VECTOR=vector, ROWS=cut.rows,
            num_warps=cut.num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return o


def cross_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    dq = q.new_empty(q.shape)
    if not q.numel():
        return dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    (B, Lq, H, D), Lk = q.shape, k.shape[1]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    logarithm = q.new_empty((B, H, Lq), dtype=torch.float32)
    delta = q.new_empty((B, H, Lq), dtype=torch.float32)
    vector = _vector(grad, q, k, v)
    spacing = (*(_strides(t, vector) for t in (grad, q, k, v)), _mask_strides(key_mask))
    scales = (scale, scale * _LOG2_E)
    with on_device_of(q):
        cut = plan.by_queries(Lq, Lk, D, q.dtype)
        blocks = -(-Lq // cut.rows)
        _cross_attention_bwd_query_kernel[(B * blocks * H,)](
            grad, q, k, v, key_mask, dq, logarithm, delta, *spacing, Lq, Lk, H, blocks, *scales,
            D=D, WIDTHS=cut.widths, KEYS=cut.keys, VECTOR=vector, ROWS=cut.rows,
            num_warps=cut.num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
        cut = plan.by_keys(B, Lq, H, Lk, D, q.dtype)
        parts = (dk, dv)
        if cut.splits > 1:
            parts = q.new_empty((2, cut.splits, *k.shape), dtype=torch.float32).unbind()
        _cross_attention_bwd_key_kernel[(B * cut.splits * cut.tiles * cut.parts * H,)](
            grad, q, k, v, key_mask, logarithm, delta, *parts, *spacing,
            Lq, Lk, B, H, cut.tiles, cut.splits, cut.span, *scales,
            D=D, WIDTHS=cut.widths, KEYS=cut.keys, PARTS=cut.parts, PART_WIDTHS=cut.part_widths,
            VECTOR=vector, ROWS=cut.rows, num_warps=cut.num_warps,
            **LAUNCH_OPTIONS,
        )  # fmt: skip
        if cut.splits > 1:
            _cross_attention_bwd_sum_kernel[(-(-k.numel() // plan.SUM_BLOCK),)](
                *parts, dk, dv, k.numel(), cut.splits, BLOCK=plan.SUM_BLOCK, **LAUNCH_OPTIONS
            )
    return dq, dk, dv


def _vector(*operands: Tensor) -> int:
    """How many elements are 16 bytes, if all rows of all operands begin at such a vector; or 1."""
    count = 16 // operands[0].itemsize
    aligned = all(
        t.data_ptr() % 16 == 0 and t.stride(3) == 1 and all(s % count == 0 for s in t.stride()[:3])
        for t in operands
    )
    return count if aligned else 1


def _strides(t: Tensor, vector: int) -> tuple[int, ...]:
    """Strides, but for the last in vectors: so the compiler sees that they are whole ones."""
    return (*(stride // vector for stride in t.stride()[:3]), t.stride(3))


def _mask_strides(key_mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if key_mask is None else (key_mask.stride(0), key_mask.stride(1))
