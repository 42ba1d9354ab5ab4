"""Networks of Stable Diffusion: their times, and what takes them, on plain torch and on kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import Clock, clock_for
from benchmarks.gpu.networks import Build, decoder, sdxl_unet, stable_diffusion_unet
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import ops

# In the order in which they are tried on a kernel's name (on the CPU: an operator's).
FAMILIES = (
    ("cross-attention, ours", r"cross_attention"),
    ("GroupNorm + SiLU, ours", r"group_norm_silu"),
    ("GEGLU, ours", r"geglu"),
    ("attention", r"flash|fmha|scaled_dot_product|attention|sdp"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|implicit_?gemm|nchwtonhwc|nhwctonchw"),
    ("matrix product", r"gemm|cutlass|cublas|nvjet|addmm|::mm|matmul|splitk"),
    ("normalisation", r"norm|rowwise_?moments"),
    ("copy", r"copy|memcpy|memset|cat|transpose|permute|fill"),
    ("upsampling", r"upsample|interpolate|pad"),
    ("elementwise", r"elementwise|vectorized|silu|gelu|add|mul|sub|div|softmax|chunk"),
)
_MOST_KERNELS = 20
_PROFILED_CALLS = 3
_LARGEST_ERROR = 0.05

MODELS: dict[str, Build] = {
    "UNet step, SD 1.5": stable_diffusion_unet,
    "VAE decode, 512²": decoder(512),
    "UNet step, SDXL": sdxl_unet,
    "VAE decode, 1024²": decoder(1024),
}


def run(context: Context) -> Iterator[Row]:
    clock = clock_for(context.device)
    for name, build in MODELS.items():
        for layout in (torch.channels_last, torch.contiguous_format):
            yield from _measured(name, build, layout, context, clock)
            if context.is_dry:
                break


@torch.inference_mode()
def _measured(
    name: str, build: Build, layout: torch.memory_format, context: Context, clock: Clock
) -> list[Row]:
    """A row for each backend; the results of both agree, or the kernels' says by how much not."""
    dtype = torch.float32 if context.is_dry else torch.float16
    torch.manual_seed(0)
    model, inputs = build(context.is_dry)
    model = model.to(context.device, dtype, memory_format=layout).eval()
    given = tuple(
        value.to(context.device, dtype if value.ndim else None, memory_format=layout)
        if value.ndim == 4
        else value.to(context.device, dtype if value.ndim else None)
        for value in inputs
    )

    def call(backend: str) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with ops.backend(backend):
                found: Tensor = model(*given)
            return found

        return forward

    # "auto": the kernels, wherever they serve.
    calls = {"plain torch": call("reference"), "fastldm": call("auto")}
    with clock.on_stream():
        plain, ours = (forward().double() for forward in calls.values())
        error = ((ours - plain).norm() / plain.norm()).item()
    times = clock.times(calls, rounds=9)
    rows = []
    for backend, forward in calls.items():
        families, kernels = _profiled(forward, context)
        row: Row = {
            "what": f"{name} (dry run)" if context.is_dry else name,
            "layout": str(layout).removeprefix("torch."),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
            "ms": times[backend].cold * 1e3,
            "how": times[backend].how,
            "families_us": families,
            "kernels": kernels,
        }
        if backend == "fastldm":
            row["difference"] = error
            if not error <= _LARGEST_ERROR:
                row["problem"] = f"{name}: the kernels' result differs by {error:.3g}"
        rows.append(row)
    return rows


def _profiled(forward: Callable[[], Any], context: Context) -> tuple[dict[str, float], list[Row]]:
    """Microseconds a call by family, and the kernels that take most."""
    activity = ProfilerActivity.CPU if context.is_dry else ProfilerActivity.CUDA
    forward()
    with profile(activities=[activity]) as found:
        for _ in range(_PROFILED_CALLS):
            forward()
        if not context.is_dry:
            torch.cuda.synchronize()
    times = {
        event.key: (event.self_cpu_time_total if context.is_dry else event.self_device_time_total)
        / _PROFILED_CALLS
        for event in found.key_averages()
    }
    families: dict[str, float] = {}
    for name, microseconds in times.items():
        family = family_of(name)
        families[family] = families.get(family, 0.0) + microseconds
    most = sorted(times.items(), key=lambda item: -item[1])[:_MOST_KERNELS]
    return (
        {name: round(value, 1) for name, value in families.items() if value},
        [{"name": name[:160], "us": round(value, 1)} for name, value in most if value],
    )


def family_of(name: str) -> str:
    """What a kernel or an operator does, by its name."""
    for family, pattern in FAMILIES:
        if re.search(pattern, name, re.IGNORECASE):
            return family
    return "other"
