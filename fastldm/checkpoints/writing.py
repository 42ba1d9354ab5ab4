"""Writing single files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.storage import atomic_file, save_weights

_PICKLES = (".ckpt", ".pt", ".pth")


def check_path(path: str | Path) -> Path:
    """`path`, if its extension is that of a weights file.

    Raises:
        ConfigError: it is not.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_PICKLES):
        raise ConfigError(f"{path}: expected a name that ends in .safetensors or .ckpt")
    return path


def write_single_file(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors as safetensors, or as ``{"state_dict": …}`` in a pickle; atomically.

    Raises:
        ConfigError: `path` has another extension.
        OSError: the file cannot be written; an earlier one is unchanged.
    """
    path = check_path(path)
    if path.suffix == ".safetensors":
        save_weights(tensors, path)
        return
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        torch.save({"state_dict": state_dict}, temporary)
