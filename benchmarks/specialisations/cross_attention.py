"""Cross-attention at sizes of the UNets, and the bytes that its kernels move."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.specialisations import Case
from fastldm.ops.cross_attention import plan
from fastldm.ops.cross_attention.triton_kernel import cross_attention_bwd, cross_attention_fwd


@dataclass(frozen=True)
class Size:
    """Of one call."""

    B: int
    Lq: int
    H: int
    Lk: int
    D: int
    dtype: torch.dtype = torch.float16
    is_masked: bool = False

    @property
    def arguments(self) -> tuple[int, int, int, int, int, torch.dtype]:
        """Of the rules in `plan`."""
        return self.B, self.Lq, self.H, self.Lk, self.D, self.dtype


# The cross-attentions of Stable Diffusion 1 at 512², which are those of the text-to-image model,
# too; of SDXL at 1024² with captions of unequal length; the most keys; float32; and one key for a
# class.
SIZES = (
    Size(2, 4096, 8, 77, 40),
    Size(2, 256, 8, 77, 160),
    Size(2, 1024, 8, 77, 80),
    Size(2, 4096, 10, 77, 64, torch.bfloat16, is_masked=True),
    Size(2, 1024, 8, 256, 64, torch.bfloat16),
    Size(2, 1024, 8, 77, 64, torch.float32),
    Size(2, 1024, 8, 1, 64),
)


def cases() -> Iterator[Case]:
    """Each size forward and backward."""
    for size in SIZES:
        given = operands(size)
        for direction in ("forward", "backward"):
            minimum, moved = traffic(size, direction)
            yield Case(
                f"{direction}, {describe(size)}",
                functools.partial(launch, given, direction),
                minimum,
                moved,
                wide=_wide(size, direction),
                tensor_cores=(f"_cross_attention_{direction[0]}wd_kernel",),
            )


def operands(size: Size, device: str = "meta") -> dict[str, Tensor | None]:
    """Uninitialised, but for a mask that leaves out no key."""
    queries, keys = ((size.B, length, size.H, size.D) for length in (size.Lq, size.Lk))
    shapes = {"grad": queries, "q": queries, "k": keys, "v": keys}
    given: dict[str, Tensor | None] = {
        name: torch.empty(shape, dtype=size.dtype, device=device) for name, shape in shapes.items()
    }
    mask = torch.ones(size.B, size.Lk, dtype=torch.bool, device=device)
    return {**given, "key_mask": mask if size.is_masked else None}


def launch(given: dict[str, Tensor | None], direction: str) -> None:
    """Run a launcher; backward for every gradient."""
    grad, q, k, v, key_mask = (given[name] for name in ("grad", "q", "k", "v", "key_mask"))
    assert grad is not None
    assert q is not None
    assert k is not None
    assert v is not None
    if direction == "forward":
        cross_attention_fwd(q, k, v, 0.125, key_mask)
    else:
        cross_attention_bwd(grad, q, k, v, 0.125, key_mask, [True] * 3)


def traffic(size: Size, direction: str) -> tuple[int, int]:
    """Minimum and moved bytes of a call."""
    head = size.B * size.H * size.D * size.dtype.itemsize
    queries, keys = size.Lq * head, size.Lk * head
    mask = size.B * size.Lk if size.is_masked else 0
    if direction == "forward":
        cut = plan.forward(*size.arguments)
        # How often the keys of a head are loaded.
        times = cut.splits if cut.is_kept else -(-size.Lq // cut.rows)
        moved = 2 * queries + 2 * keys * times + mask * size.H * cut.splits
        return 2 * queries + 2 * keys + mask, moved
    cut = plan.backward(*size.arguments)
    times = cut.splits if cut.is_kept else -(-size.Lq // cut.rows)
    # The part of the channels that a program is to find the gradients of is loaded on its own.
    own = 0 if cut.parts == 1 else 1
    own_keys = own if cut.is_kept else 1
    moved = 2 * queries * (cut.parts + own) + queries
    moved += keys * times * (2 * cut.parts + own_keys) + mask * size.H * cut.splits * cut.parts
    moved += 2 * keys
    if cut.splits > 1:
        moved += 2 * 2 * cut.splits * (keys // size.dtype.itemsize * 4)
    return 3 * queries + 4 * keys + mask, moved


def describe(size: Size) -> str:
    """In a line."""
    dtype = str(size.dtype).removeprefix("torch.")
    mask = ", masked" if size.is_masked else ""
    return f"B={size.B} Lq={size.Lq} H={size.H} Lk={size.Lk} D={size.D} {dtype}{mask}"


def _wide(size: Size, direction: str) -> tuple[str, ...]:
    """All, but for tiles that have less than 16 bytes for each thread.

    These are the last tile of keys, and the queries beside sums for 256 keys, which leave registers
    for 16 rows alone: 8 bytes a thread, and still whole lines of 128 bytes.
    """
    cut = (plan.forward if direction == "forward" else plan.backward)(*size.arguments)
    last_tile = cut.keys[-1] * cut.widths[-1] * size.dtype.itemsize
    keys = ("k_ptr", "v_ptr") if last_tile >= 16 * 32 * cut.num_warps else ()
    if direction == "forward":
        return ("q_ptr", "o_ptr", *keys)
    queries = () if size.Lk == 256 else ("grad_ptr", "q_ptr", "dq_ptr")
    return (*queries, "dk_ptr", "dv_ptr", *keys)
