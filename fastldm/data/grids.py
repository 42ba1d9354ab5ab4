"""Grids of images as PNG files, with captions under them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastldm.errors import DataError
from fastldm.storage import atomic_file

_GAP = 2
_MIN_WIDTH = 64
_LINE_HEIGHT = 12
_MAX_LINES = 3


def image_grid(
    images: torch.Tensor, columns: int | None = None, captions: Sequence[str] | None = None
) -> np.ndarray:
    """Lay out images on white, row by row, each with its caption below it.

    Images less than 64 pixels wide are enlarged by a whole number, each pixel becoming a square.

    Args:
        images: [N, C, H, W] in −1…1, of any float dtype and device; C is 1 or 3, of more
            channels the first three are shown and of two the first. Values outside are clipped
            and NaN is black.
        columns: images a row; by default as near to a square grid as can be.
        captions: N texts, wrapped to the image's width and cut after three lines.

    Returns:
        uint8 [H', W', 3].

    Raises:
        DataError: `images` is not [N, C, H, W] with N ≥ 1, or the captions differ in number.
    """
    from PIL import Image, ImageDraw, ImageFont

    if images.ndim != 4 or not len(images):
        raise DataError(f"images must be [N, C, H, W] with N ≥ 1, got shape {list(images.shape)}")
    if captions is not None and len(captions) != len(images):
        raise DataError(f"{len(images)} images but {len(captions)} captions")
    pixels = _to_uint8(images)
    factor = math.ceil(_MIN_WIDTH / pixels.shape[2])
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = pixels.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    font = ImageFont.load_default(size=10)
    texts = [_wrap(caption, width, font.getlength) for caption in captions or [""] * count]
    text_height = max(map(len, texts)) * _LINE_HEIGHT
    step_y, step_x = height + text_height + _GAP, width + _GAP
    rows = math.ceil(count / columns)
    canvas = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (image, lines) in enumerate(zip(pixels, texts, strict=True)):
        top, left = (number // columns) * step_y + _GAP, (number % columns) * step_x + _GAP
        canvas.paste(Image.fromarray(image), (left, top))
        for line_number, line in enumerate(lines):
            draw.text(
                (left, top + height + line_number * _LINE_HEIGHT), line, fill="black", font=font
            )
    return np.asarray(canvas)


def save_image_grid(
    images: torch.Tensor,
    path: str | Path,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Write `image_grid` as a PNG, atomically; the folder is made if it is missing."""
    from PIL import Image

    grid = Image.fromarray(image_grid(images, columns, captions))
    with atomic_file(path) as temporary:
        grid.save(temporary, format="PNG")


def _to_uint8(images: torch.Tensor) -> np.ndarray:
    channels = images.shape[1]
    shown = images[:, : 3 if channels >= 3 else 1].detach().float().cpu()
    scaled = torch.nan_to_num(shown, nan=-1.0).add(1.0).mul(127.5).clamp(0, 255).round()
    array = scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))


def _wrap(caption: str, width: int, length: Callable[[str], float]) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer is broken, the last line cut off."""
    words = caption.split()
    lines = [""] if words else []
    for word in words:
        if lines[-1] and length(f"{lines[-1]} {word}") > width:
            lines.append("")
        elif lines[-1]:
            lines[-1] += " "
        for letter in word:
            if lines[-1] and length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= _MAX_LINES:
        return lines
    last = lines[_MAX_LINES - 1]
    while last and length(last + "…") > width:
        last = last[:-1]
    return [*lines[: _MAX_LINES - 1], last.rstrip() + "…"]
