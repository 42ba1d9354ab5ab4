"""Tries other tilings of the GroupNorm kernels, and keeps those that are faster.

DIR/group_norm_silu_plan.json is fastldm/ops/group_norm_silu/plan.json with what was found for
this device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.candidates import BETTER, Call, Checked, ratios
from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import check_against
from benchmarks.gpu.peers import backend_of
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import ops
from fastldm.ops._triton import device_key
from fastldm.ops.group_norm_silu import plan

Config = dict[str, int]

GROUPS = 32
# Groups that are split, and groups that fit on chip.
SPLIT = [(1, 128, 512, 512), (1, 512, 128, 128), (1, 640, 256, 256), (2, 320, 64, 64)]
WHOLE = [(2, 1280, 8, 8), (2, 2560, 8, 8), (2, 1280, 16, 16), (2, 640, 32, 32)]
DRY = [(1, 64, 4, 4)]
# In the order in which they take most of a model's time: kernel, backward, shapes.
KERNELS: tuple[tuple[str, bool, list[tuple[int, ...]]], ...] = (
    ("apply", False, SPLIT), ("moments", False, SPLIT), ("bwd_apply", True, SPLIT),
    ("bwd_sums", True, SPLIT), ("fwd", False, WHOLE), ("bwd", True, WHOLE),
)  # fmt: skip
CANDIDATES: dict[str, tuple[int, ...]] = {
    "elements": (1024, 2048, 4096, 8192, 16384, 32768),
    "num_warps": (2, 4, 8, 16),
    "block_c": (64, 128, 256),
    "programs": (256, 512, 1024, 2048),
    "work": (16384, 32768, 65536),
    "elements_per_thread": (8, 16, 32, 64),
}
DRY_CANDIDATES = {"num_warps": (8,)}
_LAYOUTS = (torch.channels_last, torch.contiguous_format)


def run(context: Context) -> Iterator[Row]:
    clock = clock_for(context.device)
    device = device_key(torch.device(context.device))
    backend = backend_of("group_norm_silu", context.device)
    candidates = DRY_CANDIDATES if context.is_dry else CANDIDATES
    found: dict[str, Config] = {}
    for kernel, backward, shapes in KERNELS[:1] if context.is_dry else KERNELS:
        with clock.on_stream():
            calls = [
                _checked_call(backend, shape, layout, backward, context.device)
                for shape in (DRY if context.is_dry else shapes)
                for layout in (_LAYOUTS[:1] if context.is_dry else _LAYOUTS)
            ]
        base = dict(plan._configs(device)[kernel])
        best = dict(base)
        for name, values in candidates.items():
            for value in values:
                if value == best.get(name, value):
                    continue
                candidate = {**best, name: value}
                row = {"kernel": kernel, "candidate": candidate, "against": dict(best)}
                measured = ratios(
                    partial(planned, {**found, kernel: candidate}),
                    partial(planned, {**found, kernel: best}),
                    calls,
                    clock,
                )
                if isinstance(measured, str):
                    yield {**row, "skipped": measured}
                    continue
                if max(measured) < BETTER:
                    best = candidate
                yield {**row, "ratios": measured, "kept": best == candidate}
        if best != base:
            found[kernel] = best
        _write(context.out / "group_norm_silu_plan.json", device, found)


def _checked_call(
    backend: str,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    backward: bool,
    device: str,
) -> Checked:
    x = torch.randn(shape, device=device).half().contiguous(memory_format=layout)
    weight, bias = torch.randn(2, shape[1], device=device).half()
    upstream = torch.randn_like(x)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with ops.backend(backend):
            return ops.group_norm_silu(x, GROUPS, weight, bias)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias))

    def call(norm: Callable[..., Tensor], *operands: Tensor) -> Call:
        if not backward:
            return lambda: (norm(*operands),)
        leaves = [value.detach().requires_grad_() for value in operands]
        y = norm(*leaves)
        return lambda: torch.autograd.grad(y, leaves, upstream.to(y.dtype), retain_graph=True)

    operands = (x, weight, bias)
    exact = call(eager, *(value.double() for value in operands))()
    return Checked(call(fused, *operands), check_against(exact, call(eager, *operands)()))


@contextmanager
def planned(configs: Mapping[str, Config]) -> Iterator[None]:
    """Plans made of these configurations, and of the stored ones for the other kernels."""
    stored = plan._configs

    def combined(device: str) -> dict[str, Config]:
        return {**stored(device), **configs}

    # What the kernels call, without what it has kept of other configurations.
    whole, split = plan.whole, plan.split
    plan._configs = combined  # type: ignore[assignment]
    plan.whole, plan.split = whole.__wrapped__, split.__wrapped__  # type: ignore[assignment]
    try:
        yield
    finally:
        plan._configs, plan.whole, plan.split = stored, whole, split


def _write(path: Path, device: str, found: Mapping[str, Config]) -> None:
    stored = Path(plan.__file__).with_name("plan.json")
    table: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
    if found:
        table[device] = {**table.get(device, {}), **found}
    parts = (
        f"  {json.dumps(key)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(c)}" for name, c in configs.items())
        + "\n  }"
        for key, configs in table.items()
    )
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
