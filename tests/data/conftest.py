"""Small images on disk for the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def pixels(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Random uint8 pixels [H, W, C]."""

    def make(height: int = 20, width: int = 20, channels: int = 3) -> np.ndarray:
        return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)

    return make


@pytest.fixture
def image_folder(tmp_path: Path, pixels: Callable[..., np.ndarray]) -> Path:
    """Twelve 20×24 PNGs, all different, in one folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(pixels(20, 24)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def captioned_folder(image_folder: Path) -> Path:
    """`image_folder` with captions and string classes in metadata.jsonl."""
    rows = [
        {"file_name": f"{n:02d}.png", "caption": f"picture  {n}\n", "kind": "ab"[n % 2]}
        for n in range(12)
    ]
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return image_folder


@pytest.fixture
def break_image() -> Callable[[Path], None]:
    """Cut a file short, behind its header, so that only decoding finds out."""

    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return cut
