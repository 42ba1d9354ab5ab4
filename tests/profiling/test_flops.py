"""torch's counter knows fastldm's raw operators."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastldm import ops
from fastldm.profiling import flops as flops


def test_attention_forward_and_backward() -> None:
    q = torch.empty(2, 16, 3, 8, device="meta", requires_grad=True)
    k = torch.empty(2, 5, 3, 8, device="meta", requires_grad=True)
    product = 2 * 2 * 3 * 16 * 5 * 8
    with ops.backend("cpp"), FlopCounterMode(display=False) as counter:
        out = ops.cross_attention(q, k, k)
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    # Scores again, and four products for the three gradients.
    assert counter.get_total_flops() == (2 + 5) * product


def test_lookup_counts_every_distance() -> None:
    z, codebook = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(7, 3, device="meta")
    with ops.backend("cpp"), FlopCounterMode(display=False) as counter:
        ops.vector_quantize(z, codebook)
    assert counter.get_total_flops() == 3 * (2 * 4 * 5) * 3 * 7
