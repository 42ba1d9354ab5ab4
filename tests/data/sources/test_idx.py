from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastldm.data import DataConfig, ImageDataset, load_images
from fastldm.errors import DataError


def encode(array: np.ndarray, kind: int = 8) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    for prefix, count in (("train", 6), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(encode(images)))
        labels = np.arange(count) % 5
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(encode(labels))
    return tmp_path


def load(folder: Path, *, split: Any = "train", **values: Any) -> ImageDataset:
    values = {"resolution": 28, "channels": 1, **values}
    dataset = load_images(DataConfig(f"idx:{folder}", **values), split=split)
    assert isinstance(dataset, ImageDataset)
    return dataset


def test_images_and_labels_of_both_splits(folder: Path) -> None:
    train, test = load(folder), load(folder, split="test")
    assert (len(train), len(test)) == (6, 3)
    assert train.class_labels == [0, 1, 2, 3, 4, 0]
    assert train.class_names == test.class_names == ["0", "1", "2", "3", "4"]
    data = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    image = np.frombuffer(data, np.uint8).reshape(6, 28, 28)[2]
    item = train[2]
    assert (item["class_label"], item["name"]) == (2, "train-00002")
    assert np.abs(item["pixel_values"][0].numpy() - (image / np.float32(127.5) - 1)).max() < 1e-7


def test_a_holdout_is_taken_from_the_training_images(folder: Path) -> None:
    names = load(folder, split="test", holdout_fraction=0.5).names
    assert all(name.startswith("train") for name in names)


def test_captions_are_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match="captions are required: IDX files have none"):
        load(folder, require_captions=True)


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    labels = folder / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for data in (whole[:-1], whole[:3], encode(np.arange(6), kind=13), encode(np.zeros((6, 1)))):
        labels.write_bytes(data)
        with pytest.raises(DataError, match="train-labels-idx1-ubyte: damaged"):
            load(folder)
    labels.write_bytes(encode(np.arange(4)))
    with pytest.raises(DataError, match="6 images but 4 labels"):
        load(folder)
    labels.unlink()
    with pytest.raises(DataError, match=r"no train-labels-idx1-ubyte or .*\.gz"):
        load(folder)
