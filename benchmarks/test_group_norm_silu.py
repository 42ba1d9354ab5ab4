"""GroupNorm + SiLU on the CPU against eager, torch.compile and a copy of the input.

The yardstick is ``copy``: the input copied into memory that is held all the while. ``clone`` also
allocates its result, as a GroupNorm does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants import LAYOUTS
from benchmarks.timing import Race
from fastldm import ops

SHAPES = [(2, 320, 64, 64), (1, 128, 256, 256), (2, 1280, 8, 8), (2, 960, 32, 32)]
GROUPS = 32

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def _fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.group_norm_silu(x, GROUPS, weight, bias)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def _operands(shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    return x, torch.randn(shape[1]), torch.randn(shape[1])


def _compiled() -> Norm:
    torch._dynamo.reset()
    compiled: Norm = torch.compile(_eager)
    return compiled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, ...], layout: str, race: Race) -> None:
    operands = _operands(shape, layout)
    compiled = _compiled()
    with torch.no_grad():
        expected = _eager(*(value.double() for value in operands))
        for norm in (_fused, compiled):
            torch.testing.assert_close(norm(*operands).double(), expected, rtol=1e-5, atol=1e-5)
        held = torch.empty_like(operands[0])
        race(
            {
                "fastldm": lambda: _fused(*operands),
                "copy": lambda: held.copy_(operands[0]),
                "clone": operands[0].clone,
                "eager": lambda: _eager(*operands),
                "torch.compile": lambda: compiled(*operands),
            }
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, ...], layout: str, race: Race) -> None:
    operands = [value.requires_grad_() for value in _operands(shape, layout)]
    upstream = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    compiled = _compiled()

    def gradients(norm: Norm) -> tuple[Tensor, ...]:
        return torch.autograd.grad(norm(*operands), operands, upstream)

    wide = [value.detach().double().requires_grad_() for value in operands]
    expected = torch.autograd.grad(_eager(*wide), wide, upstream.double())
    for norm in (_fused, compiled):
        for found, exact in zip(gradients(norm), expected, strict=True):
            scale = exact.abs().max()
            torch.testing.assert_close(
                found / scale, exact / scale, rtol=0, atol=1e-5, check_dtype=False
            )
    race(
        {
            "fastldm": lambda: gradients(_fused),
            "eager": lambda: gradients(_eager),
            "torch.compile": lambda: gradients(compiled),
        }
    )
