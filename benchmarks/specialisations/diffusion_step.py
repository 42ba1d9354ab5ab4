"""The sampling steps at sizes of latents, and the bytes that their kernels move."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.specialisations import Case
from fastldm.ops.diffusion_step import triton_kernel

_POINTERS = {
    "model_output_uncond": "uncond_ptr", "noise": "noise_ptr", "predicted_variance": "variance_ptr",
}  # fmt: skip
_BY_SAMPLE = ("threshold", "guidance_scales", "seed")


@dataclass(frozen=True)
class Call:
    """A call of a step: its images and small tensors by name, and its options."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    images: tuple[str, ...] = ("model_output_uncond",)
    by_sample: tuple[str, ...] = ()
    """Of threshold, guidance_scales and seed, those that are given with a value a sample."""
    channels_last: bool = False
    mixed: bool = False
    """The model's outputs are in channels_last, the sample is not."""
    options: dict[str, Any] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    """What the launcher compiles for each of `calls`."""
    return map(_case, calls())


def calls() -> Iterator[Call]:
    """Latents of Stable Diffusion at 512² and of a 16-channel autoencoder at 1024²."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    small, large = (8, 4, 64, 64), (1, 16, 128, 128)
    uncond = "model_output_uncond"
    latest = {"return_original": False}
    yield from (
        Call("ddim", small, fp32),
        Call("ddim", small, fp16, options=latest),
        Call("ddim", large, bf16, options={"prediction_type": "v_prediction", "clip_range": 1.0}),
        Call("ddim", large, fp16, channels_last=True, options={"guidance_rescale": 0.7, **latest}),
        Call("ddim", large, fp16, mixed=True, options=latest),
        Call("ddim", small, bf16, (), ("seed", "threshold"), options={
            "prediction_type": "sample", "use_clipped_model_output": True,
        }),
        Call("ddpm", small, fp32, (uncond, "noise"), ("guidance_scales",)),
        Call("ddpm", large, bf16, (uncond,), ("seed",), options={"clip_range": 1.0, **latest}),
        Call("ddpm", small, fp32, (), ("seed",), channels_last=True, options=latest),
        Call("ddpm", large, fp16, ("noise", "predicted_variance"), options={
            "variance_type": "learned_range", **latest,
        }),
    )  # fmt: skip


def operands(call: Call, device: str = "meta") -> dict[str, Tensor]:
    """The tensors of a call, uninitialised, with one coefficient row for all samples."""
    made = {
        name: torch.empty(call.shape, dtype=call.dtype, device=device)
        for name in ("sample", "model_output", *call.images)
    }
    for name, value in made.items():
        if call.channels_last or (call.mixed and name != "sample"):
            made[name] = value.to(memory_format=torch.channels_last)
    made["coefficients"] = torch.empty(5 if call.op == "ddim" else 7, device=device)
    for name in call.by_sample:
        dtype = torch.int64 if name == "seed" else torch.float32
        made[name] = torch.empty(call.shape[0], dtype=dtype, device=device)
    if "seed" in made:
        made["offset"] = torch.empty((), dtype=torch.int64, device=device)
    return made


def launch(call: Call, given: dict[str, Tensor]) -> None:
    """Run the launcher."""
    options: dict[str, Any] = {
        "prediction_type": "epsilon", "clip_range": None, "threshold": None,
        "model_output_uncond": None, "guidance_scale": 7.5, "guidance_scales": None,
        "guidance_rescale": 0.0, "noise": None, "seed": None, "offset": None,
        "return_original": True, **call.options, **given,
    }  # fmt: skip
    tensors = [options.pop(name) for name in ("sample", "model_output", "coefficients")]
    if call.op == "ddim":
        triton_kernel.ddim_step_fwd(*tensors, **{"use_clipped_model_output": False, **options})
    else:
        fixed = {"variance_type": "fixed_small", "predicted_variance": None}
        triton_kernel.ddpm_step_fwd(*tensors, **{**fixed, **options})


def moved_bytes(call: Call, given: dict[str, Tensor]) -> tuple[int, int]:
    """Minimum and moved bytes of `launch`."""
    sample = given["sample"]
    image, count = sample.numel() * sample.itemsize, math.prod(call.shape[1:])
    written = 2 if call.options.get("return_original", True) else 1
    images = (2 + len(call.images) + written) * image
    small = [given[name] for name in (*_BY_SAMPLE, "offset") if name in given]
    minimum = images + _bytes(given["coefficients"], *small)

    columns = 4 + ("seed" in given or "noise" in given) + 2 * ("predicted_variance" in given)
    of_program = 4 * columns + sum(value.itemsize for value in small)
    moved = images
    if call.options.get("guidance_rescale"):
        _, pieces = triton_kernel.pieces_of(count)
        programs = call.shape[0] * pieces
        scale = given["guidance_scales"].itemsize if "guidance_scales" in given else 0
        loops = -(-count // triton_kernel.MOMENTS_BLOCK) * call.shape[0]
        moved += 2 * image + programs * (2 * sample.itemsize + scale + 16) + loops * scale
        of_program += 2 * 8 * pieces
    programs = call.shape[0] * -(-count // (triton_kernel.BLOCK_BYTES // sample.itemsize))
    return minimum, moved + programs * of_program


def _bytes(*tensors: Tensor) -> int:
    return sum(value.numel() * value.itemsize for value in tensors)


def _case(call: Call) -> Case:
    given = operands(call)
    wide = ["sample_ptr", "previous_ptr"]
    # The moments are taken about a first element, which is loaded alone.
    if not call.mixed and not call.options.get("guidance_rescale"):
        wide += ["output_ptr", *(_POINTERS[name] for name in call.images)]
    if call.options.get("return_original", True):
        wide.append("original_ptr")
    return Case(
        describe(call),
        functools.partial(launch, call, given),
        *moved_bytes(call, given),
        wide=tuple(wide),
    )


def describe(call: Call) -> str:
    """Operator, shape, dtype, layout and options."""
    layout = "channels_last" if call.channels_last else "contiguous"
    if call.mixed:
        layout = "contiguous with outputs in channels_last"
    dtype = str(call.dtype).removeprefix("torch.")
    names = [*call.images, *(f"{name} a sample" for name in call.by_sample)]
    names += [f"{name} {value}" for name, value in call.options.items()]
    megabytes = math.prod(call.shape) * call.dtype.itemsize / 1e6
    text = f"{call.op}, {list(call.shape)} {dtype} {layout} ({megabytes:.4g} MB)"
    return f"{text}: {', '.join(names)}"
