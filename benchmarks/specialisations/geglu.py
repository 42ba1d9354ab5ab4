"""GEGLU at sizes of UNets, and the bytes that its kernels move."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.specialisations import Case
from fastldm.ops.geglu.triton_kernel import geglu_bwd, geglu_fwd


def cases() -> Iterator[Case]:
    """The levels of Stable Diffusion's UNet at 512² with guidance; a width of 192 channels."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    for shape, dtype in [
        ((2, 4096, 2560), fp16), ((2, 1024, 5120), bf16), ((2, 64, 10240), fp16),
        ((2, 1024, 1536), fp32),
    ]:  # fmt: skip
        yield _case("forward", shape, dtype)
        yield _case("backward", shape, dtype)


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "meta"
) -> tuple[Tensor, Tensor]:
    """grad_y and hidden_states, uninitialised."""
    grad = torch.empty((*shape[:-1], shape[-1] // 2), dtype=dtype, device=device)
    return grad, torch.empty(shape, dtype=dtype, device=device)


def launch(direction: str, grad: Tensor, hidden: Tensor) -> None:
    """Run the launcher."""
    if direction == "forward":
        geglu_fwd(hidden)
    else:
        geglu_bwd(grad, hidden)


def moved_bytes(direction: str, hidden: Tensor) -> int:
    """What the kernel loads and stores, which is the minimum."""
    halves = 3 if direction == "forward" else 5
    return halves * hidden.numel() // 2 * hidden.itemsize


def _case(direction: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    grad, hidden = operands(shape, dtype)
    moved = moved_bytes(direction, hidden)
    megabytes = hidden.numel() * hidden.itemsize / 1e6
    name = f"{direction}, {list(shape)} {str(dtype).removeprefix('torch.')} ({megabytes:.4g} MB)"
    wide = ("hidden_ptr", "y_ptr") if direction == "forward" else (
        "grad_ptr", "hidden_ptr", "dhidden_ptr",
    )  # fmt: skip
    return Case(
        name, functools.partial(launch, direction, grad, hidden), moved, moved, wide=wide
    )  # fmt: skip
