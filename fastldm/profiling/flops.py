"""FLOP formulas of fastldm's raw operators, in the conventions of torch.utils.flop_counter, and
those of torch's attention on a CPU, which it knows on a GPU alone.

Importing this module registers them, so that `FlopCounterMode` counts the operators, too. A
multiplication with its addition is two; norms, activations and other elementwise work are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

_PER_TERM_OF_A_DISTANCE = 3
"""A difference, its square and the sum."""

Shape = tuple[int, ...]


def _heads_first(shape: Shape) -> Shape:
    batch, length, heads, width = shape
    return batch, heads, length, width


@register_flop_formula(torch.ops.fastldm.cross_attention_fwd)
def cross_attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Of [B, L, H, D] operands."""
    flops: int = sdpa_flop_count(_heads_first(q), _heads_first(k), _heads_first(v))
    return flops


@register_flop_formula(torch.ops.fastldm.cross_attention_bwd)
def cross_attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """The scores are computed anew, as by every fused backward."""
    flops: int = sdpa_backward_flop_count(*map(_heads_first, (grad, q, k, v)))
    return flops


@register_flop_formula(torch.ops.fastldm.vector_quantize_fwd)
def vector_quantize(z: Shape, codebook: Shape, channel_dim: int, *_: Any, **__: Any) -> int:
    """All distances of the latents to K codes."""
    elements = 1
    for extent in z:
        elements *= extent
    return _PER_TERM_OF_A_DISTANCE * elements * codebook[0]


def _attention_on_cpu(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(q, k, v)
    return flops


def _attention_on_cpu_backward(
    grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any
) -> int:
    flops: int = sdpa_backward_flop_count(grad, q, k, v)
    return flops


for _operator, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _attention_on_cpu),
    (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
        _attention_on_cpu_backward,
    ),
):
    if _operator not in flop_registry:
        register_flop_formula(_operator)(_formula)
