"""Attention on the CPU against torch's scaled_dot_product_attention.

The first sizes are those of a caption's 77 keys, then those of self-attention, and last some where
scaled_dot_product_attention may win: heads as wide as in an autoencoder, which ``auto`` leaves to
it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Race
from fastldm import ops

# B, Lq, H, D, Lk
SIZES = [
    (2, 4096, 8, 40, 77),
    (2, 1024, 8, 80, 77),
    (2, 256, 8, 160, 77),
    (1, 4096, 5, 64, 77),
    (2, 1024, 8, 16, 77),
    (2, 64, 4, 24, 24),
    (2, 1024, 8, 16, 1024),
    (2, 1024, 8, 40, 1024),
    (2, 1024, 8, 80, 1024),
    (2, 256, 8, 160, 256),
    (1, 1024, 1, 512, 1024),
]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with ops.backend("cpp"):
        return ops.cross_attention(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (value.transpose(1, 2) for value in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).contiguous()


def _operands(size: tuple[int, ...]) -> list[Tensor]:
    batch, lq, heads, width, lk = size
    return [torch.randn(batch, n, heads, width) for n in (lq, lk, lk)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size: tuple[int, ...], race: Race) -> None:
    operands = _operands(size)
    with torch.no_grad():
        expected = _sdpa(*(value.double() for value in operands))
        torch.testing.assert_close(_fused(*operands).double(), expected, rtol=1e-5, atol=1e-5)
        race({"fastldm": lambda: _fused(*operands), "sdpa": lambda: _sdpa(*operands)})


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_backward(size: tuple[int, ...], race: Race) -> None:
    operands = [value.requires_grad_() for value in _operands(size)]
    upstream = torch.randn(operands[0].shape)

    def gradients(attention: Attention, values: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*values), values, upstream.to(values[0].dtype))

    expected = gradients(_sdpa, [value.detach().double().requires_grad_() for value in operands])
    for found, exact in zip(gradients(_fused, operands), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    race(
        {
            "fastldm": lambda: gradients(_fused, operands),
            "sdpa": lambda: gradients(_sdpa, operands),
        }
    )
