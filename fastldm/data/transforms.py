"""From a decoded image to the pixels that a model sees.

`prepare` does what is the same in every epoch (so that its result can be kept), `finish` what is
drawn anew. In between an image is ``[H, W, C]``, uint8 in 0…255 or float32 in −1…1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastldm.data.config import DataConfig, Interpolation
from fastldm.errors import DataError

_AUGMENTATION_STREAM = 1
"""Sets the random numbers of augmentation apart from those of the order."""


@dataclass(frozen=True)
class Augmentation:
    """The random choices for one item in one epoch.

    `top` and `left` are shares (0 ≤ share < 1) of the possible positions of the crop; ``None`` is
    the centre.
    """

    top: float | None = None
    left: float | None = None
    flip_horizontal: bool = False
    flip_vertical: bool = False

    @classmethod
    def draw(cls, config: DataConfig, epoch: int, index: int) -> Augmentation:
        """Draw what `config` asks for, from (``config.seed``, epoch, index) alone.

        All four numbers are drawn when any is asked for, so that one option does not change
        another.
        """
        if config.crop != "random" and not (config.horizontal_flip or config.vertical_flip):
            return cls()
        entropy = np.random.SeedSequence([_AUGMENTATION_STREAM, config.seed, epoch, index])
        top, left, horizontal, vertical = np.random.default_rng(entropy).random(4).tolist()
        anywhere = config.crop == "random"
        return cls(
            top=top if anywhere else None,
            left=left if anywhere else None,
            flip_horizontal=config.horizontal_flip and horizontal < 0.5,
            flip_vertical=config.vertical_flip and vertical < 0.5,
        )


def check_size(height: int, width: int, config: DataConfig, pad: bool) -> None:
    """Refuse an image from which nothing of the asked size can be cut.

    Raises:
        DataError: says the size of the image and the size wanted.
    """
    size = f"the image is {width}×{height} pixels"
    if config.tile is not None:
        if min(height, width) < config.tile:
            raise DataError(f"{size}, smaller than tile={config.tile}")
        return
    if config.crop == "none" and not pad:
        if (height, width) != (config.resolution, config.resolution):
            raise DataError(
                f"{size}; crop='none' wants exactly resolution={config.resolution} both ways"
            )
        return
    side = max(height, width) if pad else min(height, width)
    if side < config.resolution and not config.upscale:
        raise DataError(
            f"{size}, smaller than resolution={config.resolution}; lower the resolution or set "
            "upscale=True"
        )


def prepare(array: np.ndarray, config: DataConfig, pad: bool) -> np.ndarray:
    """Scale an image so that a square of the asked size can be cut from it.

    Raises:
        DataError: the image is too small, or its values lie outside ``config.value_range``.
    """
    check_size(array.shape[0], array.shape[1], config, pad)
    array = _to_working_values(array, config.value_range)
    if config.tile is not None:
        return array
    if pad:
        array = pad_to_square(array)
    height, width = array.shape[:2]
    scale = config.resolution / min(height, width)
    return resize(array, round(height * scale), round(width * scale), config.interpolation)


def finish(array: np.ndarray, config: DataConfig, augmentation: Augmentation) -> torch.Tensor:
    """Cut a ``config.resolution`` square, flip it and give it as float32 ``[C, H, W]`` in −1…1."""
    free_rows = array.shape[0] - config.resolution
    free_columns = array.shape[1] - config.resolution
    square = cut(
        array,
        position(augmentation.top, free_rows),
        position(augmentation.left, free_columns),
        config.resolution,
    )
    return to_pixel_values(flip(square, augmentation))


def position(share: float | None, room: int) -> int:
    """The pixel at `share` of the positions 0…room, or in the middle of them."""
    return room // 2 if share is None else int(share * (room + 1))


def cut(array: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """The square of `side` pixels whose upper left corner is (top, left)."""
    return array[top : top + side, left : left + side]


def flip(array: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Mirror as drawn."""
    rows = -1 if augmentation.flip_vertical else 1
    columns = -1 if augmentation.flip_horizontal else 1
    return array[::rows, ::columns]


def to_pixel_values(array: np.ndarray) -> torch.Tensor:
    """[H, W, C], uint8 or already −1…1, to a float32 tensor [C, H, W] in −1…1."""
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    if tensor.dtype == torch.uint8:
        return tensor.float().div_(127.5).sub_(1.0)
    return tensor


def pad_to_square(array: np.ndarray) -> np.ndarray:
    """Add white on the shorter sides, evenly, the odd pixel at the bottom or right."""
    height, width, channels = array.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    white = 255 if array.dtype == np.uint8 else 1.0
    padded = np.full((side, side, channels), white, dtype=array.dtype)
    padded[top : top + height, left : left + width] = array
    return padded


def resize(array: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    """Resize with PIL's filters, antialiased when shrinking.

    uint8 stays uint8; float32 is clipped to −1…1, since Lanczos and bicubic overshoot.
    """
    if array.shape[:2] == (height, width):
        return array
    from PIL import Image

    resample = {
        "lanczos": Image.Resampling.LANCZOS,
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "area": Image.Resampling.BOX,
        "nearest": Image.Resampling.NEAREST,
    }[interpolation]

    def resize_image(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((width, height), resample))

    if array.dtype == np.uint8 and array.shape[2] == 3:
        return resize_image(array)
    planes = [resize_image(array[..., channel]) for channel in range(array.shape[2])]
    resized = np.stack(planes, axis=-1)
    return resized if resized.dtype == np.uint8 else resized.clip(-1.0, 1.0)


def _to_working_values(array: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return array.astype(np.float32) / np.float32(32767.5) - np.float32(1)
    low, high = value_range
    slack = 1e-4 * (high - low)
    smallest, largest = float(array.min()), float(array.max())
    if not (smallest >= low - slack and largest <= high + slack):
        raise DataError(
            f"float values from {smallest:g} to {largest:g} lie outside "
            f"value_range=({low:g}, {high:g}); set value_range to what −1 and 1 should be"
        )
    scaled = (array.astype(np.float64) - low) * (2 / (high - low)) - 1
    return scaled.clip(-1.0, 1.0).astype(np.float32)
