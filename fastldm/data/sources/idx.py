"""IDX files, the format of MNIST and Fashion-MNIST (yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np

from fastldm.data.config import DataConfig
from fastldm.data.sources.table import Fields, ImageTable, class_map
from fastldm.errors import DataError

_PREFIXES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8


def read_idx(folder: Path, config: DataConfig, split: str) -> ImageTable:
    """Images and labels of one split, from ``train-images-idx3-ubyte[.gz]`` and its siblings.

    Raises:
        DataError: a file is missing or damaged, or images and labels differ in number.
    """
    import datasets

    own_split = config.holdout_fraction is None
    prefix = _PREFIXES[split if own_split else "train"]
    images = _read_array(folder, f"{prefix}-images-idx3-ubyte", rank=3)
    labels = _read_array(folder, f"{prefix}-labels-idx1-ubyte", rank=1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels")
    training_labels = _read_array(folder, f"{_PREFIXES['train']}-labels-idx1-ubyte", rank=1)
    columns = {
        "image": _npy_files(images),
        "class": labels.tolist(),
        "name": [f"{prefix}-{index:05d}" for index in range(len(images))],
    }
    return ImageTable(
        rows=datasets.Dataset.from_dict(columns),
        fields=Fields(image="image", label="class", name="name"),
        origin=str(folder),
        classes=class_map(training_labels.tolist(), config, str(folder)),
        own_split=own_split,
        why_no_captions="IDX files have none",
    )


def _read_array(folder: Path, name: str, rank: int) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: there is no {name} or {name}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        if (zeros, kind, dimensions) != (0, _UNSIGNED_BYTE, rank):
            raise ValueError(f"expected unsigned bytes of rank {rank}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(f"{path}: damaged or not an IDX file ({error})") from None


def _npy_files(images: np.ndarray) -> list[bytes]:
    """Each of [N, H, W] as a ``.npy`` file; all have the same header."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": images.dtype.str, "fortran_order": False, "shape": images.shape[1:]}
    )
    header = buffer.getvalue()
    return [header + image.tobytes() for image in images]
