"""Images to files, folders of either kind, and full disks."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.cli.common import default_device, save_image, write_errors
from fastldm.errors import DataError, TrainingError


@pytest.mark.parametrize(
    ("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGBA"), (5, "RGB")]
)
def test_pixels_and_modes(tmp_path: Path, channels: int, mode: str) -> None:
    image = torch.linspace(-1.2, 1.2, channels * 12).view(channels, 3, 4)
    save_image(image, tmp_path / "image.png")
    read = Image.open(tmp_path / "image.png")
    assert read.mode == mode
    shown = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    expected = ((image[:shown].double() + 1) * 127.5).clamp(0, 255).round().permute(1, 2, 0)
    assert np.array_equal(np.asarray(read).reshape(3, 4, shown), expected.numpy())


def test_the_cpu_can_be_asked_for() -> None:
    assert default_device(cpu=True) == torch.device("cpu")
    if not torch.accelerator.is_available():
        assert default_device(cpu=False) == torch.device("cpu")


def test_only_write_errors_are_translated() -> None:
    with pytest.raises(TrainingError, match="out could not be written: no space left"), \
            write_errors("out"):  # fmt: skip
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DataError), write_errors("out"):
        raise DataError("an image")
    with pytest.raises(KeyError), write_errors("out"):
        raise KeyError("a bug")
