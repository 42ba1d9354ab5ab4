"""GroupNorm + SiLU at sizes of VAEs and UNets, and the bytes that its kernels move."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.specialisations import Case
from fastldm.ops.group_norm_silu import plan
from fastldm.ops.group_norm_silu.triton_kernel import group_norm_silu_bwd, group_norm_silu_fwd
from fastldm.ops.group_norm_silu.triton_tiles import sizes_of

NUM_GROUPS = 32
AFFINE = ("weight", "bias")
EVERY_OPTION = (*AFFINE, "channel_add", "residual", "scale", "shift")
_IMAGES = ("x_ptr", "residual_ptr", "grad_ptr", "y_ptr", "dx_ptr")


def cases() -> Iterator[Case]:
    """In channels_last: a VAE's decoder, then a UNet's; then contiguous and float32."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for shape in [(1, 128, 512, 512), (1, 512, 64, 64)]:
        yield _forward(shape, bf16, True, AFFINE)
        yield _backward(shape, bf16, True, AFFINE)
    yield _forward((2, 320, 64, 64), bf16, True, EVERY_OPTION)
    yield _backward((2, 320, 64, 64), bf16, True, EVERY_OPTION)
    yield _forward((2, 1920, 32, 32), fp16, True, (*AFFINE, "channel_add"))
    for channels in (960, 1280, 2560):
        yield _forward((2, channels, 8, 8), fp16, True, (*AFFINE, "channel_add"))
    # The largest tiles that are read once, with one group and with several.
    yield _forward((2, 1280, 16, 16), fp32, True, EVERY_OPTION)
    yield _forward((2, 320, 16, 16), fp16, True, AFFINE)
    yield _backward((2, 960, 8, 8), fp16, True, (*AFFINE, "channel_add"))
    yield _backward((2, 2560, 8, 8), fp32, True, EVERY_OPTION)
    yield _forward((2, 320, 64, 64), fp16, False, AFFINE)
    yield _backward((2, 320, 64, 64), fp16, False, AFFINE)
    yield _forward((2, 1280, 8, 8), fp16, False, AFFINE)
    yield _forward((2, 224, 64, 64), fp32, True, AFFINE)
    yield _backward((2, 224, 64, 64), fp32, True, AFFINE)


def operands(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    names: tuple[str, ...],
    device: str = "meta",
) -> dict[str, Tensor]:
    """x, grad_y and the named arguments, uninitialised."""
    shapes = {"weight": shape[1:2], "bias": shape[1:2], **dict.fromkeys(("residual", "x"), shape)}
    made = {
        name: torch.empty(shapes.get(name, shape[:2]), dtype=dtype, device=device)
        for name in ("x", *names)
    }
    for name in ("x", "residual"):
        if name in made and channels_last:
            made[name] = made[name].to(memory_format=torch.channels_last)
    made["grad_y"] = torch.empty_like(made["x"])
    return made


def forward(given: dict[str, Tensor], num_groups: int = NUM_GROUPS) -> None:
    """Run the forward launcher."""
    o = _with_missing(given)
    group_norm_silu_fwd(
        o["x"], num_groups, o["weight"], o["bias"], 1e-5, True, o["channel_add"], o["residual"],
        o["scale"], o["shift"],
    )  # fmt: skip


def backward(given: dict[str, Tensor], num_groups: int = NUM_GROUPS) -> None:
    """Run the backward launcher for every gradient."""
    o = _with_missing(given)
    mean, rstd = given["x"].new_empty((2, given["x"].shape[0], num_groups), dtype=torch.float32)
    group_norm_silu_bwd(
        o["grad_y"], o["x"], mean, rstd, num_groups, o["weight"], o["bias"], 1e-5, True,
        o["channel_add"], o["residual"], o["scale"], o["shift"], [True] * 6,
    )  # fmt: skip


def forward_bytes(given: dict[str, Tensor], num_groups: int = NUM_GROUPS) -> tuple[int, int]:
    """Minimum and moved bytes of `forward`."""
    sizes = sizes_of(given["x"], num_groups)
    inputs = _bytes(given, "x", "residual")
    y, statistics = _bytes(given, "x"), 8 * sizes.batch * num_groups
    minimum = inputs + y + statistics + _bytes(given, *_VECTORS)
    if plan.whole("fwd", "default", sizes) is not None:
        return minimum, inputs + y + statistics + _vectors(given, sizes, 1)
    moments, apply = (plan.split(kernel, "default", sizes) for kernel in ("moments", "apply"))
    rows = sizes.batch * sizes.channels
    scratch = (8 + 12) * rows * moments.splits + _bytes(given, "channel_add")
    read_back = 8 * rows * apply.splits
    vectors = _vectors(given, sizes, apply.splits)
    return minimum, 2 * inputs + y + statistics + scratch + read_back + vectors


def backward_bytes(given: dict[str, Tensor], num_groups: int = NUM_GROUPS) -> tuple[int, int]:
    """Minimum and moved bytes of `backward`."""
    sizes = sizes_of(given["x"], num_groups)
    rows, groups = sizes.batch * sizes.channels, sizes.batch * num_groups
    inputs, dx = _bytes(given, "x", "residual", "grad_y"), _bytes(given, "x")
    gradients = _bytes(given, *_VECTORS)
    minimum = inputs + dx + 2 * gradients + 8 * groups
    moved = dx + gradients
    if "scale" in given:
        moved += _over_samples(given, sizes, *AFFINE)
    if "weight" in given or "bias" in given:
        moved += 2 * 8 * rows + _bytes(given, "scale")
    if plan.whole("bwd", "default", sizes) is not None:
        return minimum, moved + inputs + 8 * rows + _vectors(given, sizes, 1)
    sums, apply = (plan.split(kernel, "default", sizes) for kernel in ("bwd_sums", "bwd_apply"))
    count = 3 if "channel_add" in given else 2
    moved += 2 * inputs + _vectors(given, sizes, sums.splits + apply.splits)
    moved += 2 * 4 * count * rows * sums.splits + 12 * groups
    moved += 8 * rows * sums.splits + 16 * rows * apply.splits
    moved += _over_samples(given, sizes, "weight") + _bytes(given, "scale")
    return minimum, moved


_VECTORS = ("weight", "bias", "channel_add", "scale", "shift")


def _vectors(given: dict[str, Tensor], sizes: plan.Sizes, times: int) -> int:
    """What as many programs along the pixels read of the values by channel."""
    return times * _over_samples(given, sizes, *_VECTORS)


def _over_samples(given: dict[str, Tensor], sizes: plan.Sizes, *names: str) -> int:
    return sum(
        sizes.batch * sizes.channels * given[name].itemsize for name in names if name in given
    )


def _bytes(given: dict[str, Tensor], *names: str) -> int:
    return sum(given[name].numel() * given[name].itemsize for name in names if name in given)


def _with_missing(given: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {**dict.fromkeys(EVERY_OPTION), **given}


def _forward(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, names: tuple[str, ...]
) -> Case:
    given = operands(shape, dtype, channels_last, names)
    name = f"forward, {_describe(given, channels_last)}"
    return Case(name, functools.partial(forward, given), *forward_bytes(given), wide=_wide(given))


def _backward(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, names: tuple[str, ...]
) -> Case:
    given = operands(shape, dtype, channels_last, names)
    name = f"backward, {_describe(given, channels_last)}"
    return Case(
        name, functools.partial(backward, given), *backward_bytes(given), wide=_wide(given, True)
    )


def _wide(given: dict[str, Tensor], backward: bool = False) -> tuple[str, ...]:
    names = {"x_ptr"} | ({"grad_ptr", "dx_ptr"} if backward else {"y_ptr"})
    if "residual" in given:
        names.add("residual_ptr")
    return tuple(name for name in _IMAGES if name in names)


def _describe(given: dict[str, Tensor], channels_last: bool) -> str:
    x = given["x"]
    layout = "channels_last" if channels_last else "contiguous"
    others = [name for name in EVERY_OPTION if name in given]
    options = "every option" if len(others) == len(EVERY_OPTION) else ", ".join(others)
    megabytes = math.prod(x.shape) * x.itemsize / 1e6
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{list(x.shape)} {dtype} {layout} ({megabytes:.4g} MB) with {options}"
