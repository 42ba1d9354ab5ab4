"""What the functionals' argument checks share."""

from __future__ import annotations

from torch import Tensor

from fastldm.errors import ConfigError


def describe(tensor: Tensor) -> str:
    """Dtype, shape and device, as the errors give them."""
    return f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"


def shape_and_device(
    name: str, value: Tensor | None, shape: tuple[int, ...], meaning: str, like: Tensor
) -> None:
    """Raise ConfigError unless `value` is None or floating, of `shape` and beside `like`."""
    if value is None:
        return
    fits = tuple(value.shape) == tuple(shape) and value.device == like.device
    if not fits or not value.is_floating_point():
        raise ConfigError(
            f"{name}: got {describe(value)}; accepted: a floating tensor {list(shape)} "
            f"({meaning}) on {like.device}"
        )
