"""Cross-attention on a GPU: all keys of a head at once, no online softmax.

A head has few keys, so a program keeps them and their values on chip and goes through queries in
blocks: a whole row of scores S = scale·q·kᵀ, P = softmax(S) and o = P·v in one go. The backward
keeps nothing but the operands and goes through the queries again; with ∂P = ∂o·vᵀ::

    ∂S = P∘(∂P − rowsum(P∘∂P))      ∂q = scale·∂S·k      ∂k = scale·∂Sᵀ·q      ∂v = Pᵀ·∂o

Either way a query is read once. Where the queries are split over programs, a second kernel adds
their sums for ∂k and ∂v, always in the same order. A head too wide for all its gradients to stay
in registers is cut into parts, whose programs each find ∂S anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.ops._triton import LAUNCH_OPTIONS, on_device_of, shared_memory_of
from fastldm.ops.cross_attention import plan
from fastldm.ops.cross_attention.triton_tiles import (
    LOADS_STAY_IN_LOOP,
    LOG2_E,
    add_product,
    attended_keys,
    head_of,
    load,
    load_keys,
    mask_strides_of,
    softmax,
    store,
    strides_of,
    times,
    times_transposed,
    vector_of,
    zeros,
)

# Of a thread: the backward pass is planned for them, and the compiler would spill a few for fewer.
_MOST_REGISTERS = 255


@triton.jit
def _cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, o_ptr, q_strides, k_strides, v_strides, mask_strides,
    Lq, Lk, H, splits, span, scale_log2,
    D: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr, KEPT: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """o of `span` queries; keys and values stay on chip if KEPT."""
    # Heads are neighbours in memory, so their programs follow each other.
    h = (tl.program_id(0) % H).to(tl.int64)
    split = (tl.program_id(0) // H % splits).to(tl.int64)
    b = (tl.program_id(0) // H // splits).to(tl.int64)
    q_ptr = head_of(q_ptr, q_strides, b, h, VECTOR)
    k_ptr = head_of(k_ptr, k_strides, b, h, VECTOR)
    v_ptr = head_of(v_ptr, v_strides, b, h, VECTOR)
    keys, keeps, attended = attended_keys(key_mask_ptr, mask_strides, b, Lk, KEYS)
    if KEPT:
        k = load_keys(k_ptr, k_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
        v = load_keys(v_ptr, v_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
    for start in range(split * span, tl.minimum(Lq, (split + 1) * span), ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        q = load(q_ptr, q_strides, rows, rows < Lq, 0, D, WIDTHS, VECTOR)
        if not KEPT:
            k = load_keys(k_ptr, k_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
        exponentials, reciprocal = softmax(q, k, keeps, attended, scale_log2)
        if not KEPT:
            v = load_keys(v_ptr, v_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
        o = zeros(ROWS, WIDTHS)
        for j in tl.static_range(len(KEYS)):
            o = add_product(o, exponentials[j].to(q[0].dtype), v[j])
        o = times(o, reciprocal[:, None])
        store(o_ptr, o, b, h, rows, rows < Lq, 0, Lq, H, D, WIDTHS)


@triton.jit
def _cross_attention_bwd_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, dq_ptr, dk_ptr, dv_ptr,
    grad_strides, q_strides, k_strides, v_strides, mask_strides,
    Lq, Lk, B, H, splits, span, scale, scale_log2,
    D: tl.constexpr, WIDTHS: tl.constexpr, PART_WIDTHS: tl.constexpr, PARTS: tl.constexpr,
    KEYS: tl.constexpr, KEPT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """∂q of `span` queries, and their share of ∂k and ∂v, each for a part of the channels."""
    h = (tl.program_id(0) % H).to(tl.int64)
    rest = tl.program_id(0) // H
    column = rest % PARTS * PART_WIDTHS[0]
    split = (rest // PARTS % splits).to(tl.int64)
    b = (rest // PARTS // splits).to(tl.int64)
    grad_ptr = head_of(grad_ptr, grad_strides, b, h, VECTOR)
    q_ptr = head_of(q_ptr, q_strides, b, h, VECTOR)
    k_ptr = head_of(k_ptr, k_strides, b, h, VECTOR)
    v_ptr = head_of(v_ptr, v_strides, b, h, VECTOR)
    keys, keeps, attended = attended_keys(key_mask_ptr, mask_strides, b, Lk, KEYS)
    if KEPT:
        k = load_keys(k_ptr, k_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
        v = load_keys(v_ptr, v_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
        k_part = k
        if PARTS > 1:
            k_part = load_keys(k_ptr, k_strides, keys, keeps, column, D, PART_WIDTHS, VECTOR)
    dk = ()
    dv = ()
    if dk_ptr is not None:
        for j in tl.static_range(len(KEYS)):
            dk += (zeros(KEYS[j], PART_WIDTHS),)
            dv += (zeros(KEYS[j], PART_WIDTHS),)
    end = tl.minimum(Lq, (split + 1) * span)
    for start in tl.range(split * span, end, ROWS, disable_licm=LOADS_STAY_IN_LOOP):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        in_rows = rows < Lq
        q = load(q_ptr, q_strides, rows, in_rows, 0, D, WIDTHS, VECTOR)
        if not KEPT:
            k = load_keys(k_ptr, k_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
        exponentials, reciprocal = softmax(q, k, keeps, attended, scale_log2)
        if not KEPT:
            v = load_keys(v_ptr, v_strides, keys, keeps, 0, D, WIDTHS, VECTOR)
        # Not before: it would be in registers beside the exponentials.
        grad = load(grad_ptr, grad_strides, rows, in_rows, 0, D, WIDTHS, VECTOR)
        p = ()
        dp = ()
        delta = tl.zeros((ROWS,), tl.float32)
        for j in tl.static_range(len(KEYS)):
            p += (tl.where(in_rows[:, None], exponentials[j] * reciprocal[:, None], 0.0),)
            dp += (times_transposed(grad, v[j]),)
            delta += tl.sum(p[j] * dp[j], 1)
        if not KEPT:
            k_part = load_keys(k_ptr, k_strides, keys, keeps, column, D, PART_WIDTHS, VECTOR)
        q_part = q
        grad_part = grad
        if PARTS > 1:
            q_part = load(q_ptr, q_strides, rows, in_rows, column, D, PART_WIDTHS, VECTOR)
            grad_part = load(grad_ptr, grad_strides, rows, in_rows, column, D, PART_WIDTHS, VECTOR)
        sums = dk, dv
        dk = ()
        dv = ()
        dscores = ()
        for j in tl.static_range(len(KEYS)):
            ds = (p[j] * (dp[j] - delta[:, None])).to(q[0].dtype)
            dscores += (ds,)
            if dk_ptr is not None:
                dk += (add_product(sums[0][j], tl.trans(ds), q_part),)
                dv += (add_product(sums[1][j], tl.trans(p[j].to(q[0].dtype)), grad_part),)
        # Last, because Triton lays all products out as this one: the warps side by side in a row.
        if dq_ptr is not None:
            dq = zeros(ROWS, PART_WIDTHS)
            for j in tl.static_range(len(KEYS)):
                dq = add_product(dq, dscores[j], k_part[j])
            dq = times(dq, scale)
            store(dq_ptr, dq, b, h, rows, in_rows, column, Lq, H, D, PART_WIDTHS)
    if dk_ptr is not None:
        b += split * B
        for j in tl.static_range(len(KEYS)):
            in_keys = keys[j] < Lk
            dk_scaled = times(dk[j], scale)
            store(dk_ptr, dk_scaled, b, h, keys[j], in_keys, column, Lk, H, D, PART_WIDTHS)
            store(dv_ptr, dv[j], b, h, keys[j], in_keys, column, Lk, H, D, PART_WIDTHS)


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
    (B, Lq, H, D), Lk = q.shape, k.shape[1]
    cut = plan.forward(B, Lq, H, Lk, D, q.dtype, shared_memory_of(q.device))
    vector = vector_of(q, k, v)
    with on_device_of(q):
        _cross_attention_fwd_kernel[(B * cut.splits * H,)](
            q, k, v, key_mask, o, *(strides_of(x, vector) for x in (q, k, v)),
            mask_strides_of(key_mask), Lq, Lk, H, cut.splits, cut.span, scale * LOG2_E,
            D=D, WIDTHS=cut.widths, KEYS=cut.keys, KEPT=cut.is_kept, VECTOR=vector, ROWS=cut.rows,
            num_warps=cut.num_warps, num_stages=cut.num_stages, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return o


def cross_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, contiguous; [0] where not wanted."""
    want_q, want_keys = wanted[0], wanted[1] or wanted[2]
    dq, dk, dv = gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    if not q.numel():
        dk.zero_()
        dv.zero_()
    else:
        (B, Lq, H, D), Lk = q.shape, k.shape[1]
        cut = plan.backward(B, Lq, H, Lk, D, q.dtype, shared_memory_of(q.device))
        vector = vector_of(grad, q, k, v)
        is_split = want_keys and cut.splits > 1
        sums: tuple[Tensor | None, ...] = (dk, dv) if want_keys else (None, None)
        if is_split:
            sums = k.new_empty((2, cut.splits, *k.shape), dtype=torch.float32).unbind()
        with on_device_of(q):
            _cross_attention_bwd_kernel[(B * cut.splits * cut.parts * H,)](
                grad, q, k, v, key_mask, dq if want_q else None, *sums,
                *(strides_of(x, vector) for x in (grad, q, k, v)), mask_strides_of(key_mask),
                Lq, Lk, B, H, cut.splits, cut.span, scale, scale * LOG2_E,
                D=D, WIDTHS=cut.widths, PART_WIDTHS=cut.part_widths, PARTS=cut.parts,
                KEYS=cut.keys, KEPT=cut.is_kept, VECTOR=vector, ROWS=cut.rows,
                num_warps=cut.num_warps, num_stages=cut.num_stages, maxnreg=_MOST_REGISTERS,
                **LAUNCH_OPTIONS,
            )  # fmt: skip
            if is_split:
                _cross_attention_bwd_sum_kernel[(-(-k.numel() // plan.SUM_BLOCK),)](
                    *sums, dk, dv, k.numel(), cut.splits, BLOCK=plan.SUM_BLOCK, **LAUNCH_OPTIONS
                )
    return tuple(x if want else x.new_empty(0) for x, want in zip(gradients, wanted, strict=True))
