"""Reading the tensors of a single file: no code is run, and nothing outgrows the file.

``.safetensors`` files and the zip archives of ``torch.save`` are mapped into memory, so a file of
several gigabytes opens at once and only what is used is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastldm.errors import CheckpointError
from fastldm.storage import pickle_problem

Source = str | Path | Mapping[str, Tensor]
"""A file, or its tensors by name."""

_ZIP_MAGIC = b"PK\x03\x04"
_MOST_SHARING = 4
"""How often the bytes of a file may be used, as where two names stand for one tensor."""

_BYSTANDERS = (
    "_codecs.encode",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
"""What Lightning leaves in a checkpoint beside the weights; an `_Inert` stands in for each."""


class _Inert:
    """Takes the place of an object that has nothing to do with the weights, and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def describe_source(source: Source) -> str:
    """`source` for messages."""
    return "the given tensors" if isinstance(source, Mapping) else str(source)


def read_tensors(source: Source) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or a pickle (``.ckpt``, ``.pt``, ``.pth``, ``.bin``).

    A pickle is only ever read with ``weights_only=True``; a nested ``state_dict``, as training
    frameworks write it, is unwrapped.

    Raises:
        CheckpointError: the file is missing, damaged or not a weights file, holds code, or claims
            tensors that are larger than itself.
    """
    name = describe_source(source)
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"{name}: {'not a file' if path.exists() else 'no such file'}")
        tensors = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name}: {key!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise CheckpointError(f"{name}: {key} is sparse, nested or quantised")
    if not tensors:
        raise CheckpointError(f"{name}: holds no tensors")
    if not isinstance(source, Mapping):
        _refuse_more_than_the_file(tensors, Path(source))
    return tensors


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and not start.startswith(_ZIP_MAGIC)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # damaged headers raise many types
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file ({error}); copy or download it again"
        ) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        is_archive = _check_archive(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _BYSTANDERS]):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises many types on a damaged file
        raise CheckpointError(f"{path}: {pickle_problem(error)}") from None
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a dict of named tensors")
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}


def _check_archive(path: Path) -> bool:
    """Whether the file is a zip archive; one that would unpack to more than itself is refused."""
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: damaged or cut off ({error}); copy or download it again"
        ) from None
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: its entries are compressed, as torch never writes them")
    return True


def _refuse_more_than_the_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that repeat their bytes, which would fill the memory once they are copied."""
    total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > tensor.untyped_storage().nbytes() or total > _MOST_SHARING * path.stat().st_size:
            raise CheckpointError(
                f"{path}: {name} {list(tensor.shape)} claims more bytes than the file has"
            )
