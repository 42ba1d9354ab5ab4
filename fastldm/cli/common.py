"""What several commands need: the device, images to files, errors of the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastldm.errors import FastLDMError, TrainingError
from fastldm.storage import atomic_file
from fastldm.training.checkpointing import is_write_error, write_error_reason

_MODEL_INDEX = "model_index.json"
_CHANNELS_OF_PNG = (1, 3, 4)


def default_device(cpu: bool) -> torch.device:
    """The accelerator where there is one and it is not refused, else the CPU."""
    if not cpu and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def is_latent_diffusion(folder: str | Path) -> bool:
    """Whether a folder holds both stages."""
    return Path(folder, _MODEL_INDEX).is_file()


def save_image(image: Tensor, path: Path) -> None:
    """Write one image [C, H, W] in [−1, 1] as an 8-bit PNG; of other than 1, 3 or 4 channels the
    first three, or the first, are written."""
    from PIL import Image

    channels = len(image)
    if channels not in _CHANNELS_OF_PNG:
        image = image[: 3 if channels > 3 else 1]
    pixels = image.detach().float().cpu().add(1.0).mul(127.5).clamp(0, 255).round()
    array = pixels.to(torch.uint8).permute(1, 2, 0).numpy()
    array = array[..., 0] if array.shape[-1] == 1 else array
    with atomic_file(path) as temporary:
        Image.fromarray(np.ascontiguousarray(array)).save(temporary, format="PNG")


@contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Turn a full disk into an error that names what could not be written."""
    try:
        yield
    except FastLDMError:
        raise
    except Exception as error:
        if not is_write_error(error):
            raise
        raise TrainingError(f"{what} could not be written: {write_error_reason(error)}") from error
