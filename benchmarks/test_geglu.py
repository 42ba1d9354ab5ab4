"""GEGLU on the CPU against eager, torch.compile and a copy that moves as many bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Race
from fastldm import ops

# A UNet's levels at 32² latents with guidance, and Stable Diffusion's first level at 512².
SHAPES = [(2, 1024, 1280), (2, 256, 2560), (2, 64, 5120), (2, 4096, 2560)]

Gate = Callable[[Tensor], Tensor]


def _eager(hidden_states: Tensor) -> Tensor:
    value, gate = hidden_states.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _compiled() -> Gate:
    torch._dynamo.reset()
    compiled: Gate = torch.compile(_eager)
    return compiled


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, ...], race: Race) -> None:
    hidden = torch.randn(shape)
    # A copy reads and writes: three halves of the input are moved.
    as_many_bytes = torch.randn(hidden.numel() * 3 // 4)
    compiled = _compiled()
    with torch.no_grad():
        expected = _eager(hidden.double())
        for gate in (ops.geglu, compiled):
            torch.testing.assert_close(gate(hidden).double(), expected, rtol=1e-5, atol=1e-6)
        race(
            {
                "fastldm": lambda: ops.geglu(hidden),
                "copy of as many bytes": as_many_bytes.clone,
                "eager": lambda: _eager(hidden),
                "torch.compile": lambda: compiled(hidden),
            }
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, ...], race: Race) -> None:
    hidden = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], shape[-1] // 2)
    compiled = _compiled()

    def gradient(gate: Gate) -> Tensor:
        return torch.autograd.grad(gate(hidden), hidden, upstream)[0]

    wide = hidden.detach().double().requires_grad_()
    expected = torch.autograd.grad(_eager(wide), wide, upstream.double())[0]
    for gate in (ops.geglu, compiled):
        torch.testing.assert_close(gradient(gate).double(), expected, rtol=1e-5, atol=1e-5)
    race(
        {
            "fastldm": lambda: gradient(ops.geglu),
            "eager": lambda: gradient(_eager),
            "torch.compile": lambda: gradient(compiled),
        }
    )
