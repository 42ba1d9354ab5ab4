"""The specification of cross-attention, in plain torch.

With S = scale·q·kᵀ and keys that `key_mask` leaves out at −∞, o = softmax(S)·v. Half precisions
multiply with float32 sums, and their softmax is in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops._schema import compute_dtype


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
) -> Tensor:
    """o, [B, Lq, H, D]."""
    mask = None if key_mask is None else _with_a_key(key_mask)[:, None, None, :]
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    ).transpose(1, 2)
    if key_mask is not None:
        o = o.masked_fill(~key_mask.any(1)[:, None, None, None], 0)
    return o.contiguous()


def cross_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v by the formula, [0] where not wanted; P = softmax(S) is found anew.

    ∂v = Pᵀ·∂o, ∂S = P∘(∂P − rowsum(P∘∂P)) with ∂P = ∂o·vᵀ, ∂q = scale·∂S·k, ∂k = scale·∂Sᵀ·q.
    """
    dtype = compute_dtype(q)
    # Autocast would round the products of the float32 operands.
    with torch.autocast(q.device.type, enabled=False):
        qc, kc, vc, g = (tensor.to(dtype) for tensor in (q, k, v, grad))
        scores = torch.einsum("bqhd,bkhd->bhqk", qc, kc) * scale
        if key_mask is not None:
            scores = scores.masked_fill(~_with_a_key(key_mask)[:, None, None, :], -torch.inf)
        p = scores.softmax(-1)
        if key_mask is not None:
            p = p.masked_fill(~key_mask.any(1)[:, None, None, None], 0)
        dp = torch.einsum("bqhd,bkhd->bhqk", g, vc)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        products = (
            ("bhqk,bkhd->bqhd", ds, kc), ("bhqk,bqhd->bkhd", ds, qc), ("bhqk,bqhd->bkhd", p, g)
        )  # fmt: skip
        return tuple(
            torch.einsum(*product).to(q.dtype).contiguous() if want else q.new_empty(0)
            for product, want in zip(products, wanted, strict=True)
        )


def _with_a_key(key_mask: Tensor) -> Tensor:
    """The mask, all true for a sample without any key, so that its softmax is defined."""
    return key_mask | ~key_mask.any(1, keepdim=True)
