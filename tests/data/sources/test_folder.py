from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastldm.data import DataConfig, ImageDataset, load_images
from fastldm.errors import DataError

Pixels = Callable[..., np.ndarray]


def load(folder: Path, *, split: Any = "train", **values: Any) -> ImageDataset:
    dataset = load_images(DataConfig(str(folder), **{"resolution": 16, **values}), split=split)
    assert isinstance(dataset, ImageDataset)
    return dataset


def add(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels()).save(path)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no images .*\.png"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="holds no images"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"notes\.txt: a file; the source must be a folder"):
        load(tmp_path / "notes.txt")


def test_only_visible_images_are_listed_sorted_and_links_followed(
    tmp_path: Path, pixels: Pixels
) -> None:
    photos = tmp_path / "photos"
    for name in ("b/2.PNG", "b/10.jpg", "a/1.webp", ".hidden/3.png", ".4.png"):
        add(photos / name, pixels)
    (photos / "readme.md").write_text("text")
    (photos / "b" / "Thumbs.db").write_text("text")
    add(tmp_path / "elsewhere" / "5.png", pixels)
    (photos / "c").symlink_to(tmp_path / "elsewhere")
    (photos / "6.png").symlink_to(tmp_path / "elsewhere" / "5.png")
    (photos / "b" / "round").symlink_to(photos)
    expected = ["6.png", "a/1.webp", "b/10.jpg", "b/2.PNG", "c/5.png"]
    assert load(photos).names == expected


def test_classes_are_the_first_subfolders(tmp_path: Path, pixels: Pixels) -> None:
    for name in ("dogs/1.png", "cats/deep/2.png", "cats/3.png"):
        add(tmp_path / name, pixels)
    dataset = load(tmp_path)
    assert dataset.class_names == ["cats", "dogs"]
    assert dataset.class_labels == [0, 0, 1]
    fixed = load(tmp_path, class_names=("dogs", "birds", "cats"))
    assert fixed.class_names == ["dogs", "birds", "cats"]
    assert fixed.class_labels == [2, 2, 0]
    with pytest.raises(DataError, match=r"'dogs' is not in class_names \['cats', 'birds'\]"):
        load(tmp_path, class_names=("cats", "birds"))
    add(tmp_path / "loose.png", pixels)
    assert load(tmp_path).class_names is None
    with pytest.raises(DataError, match=r"loose\.png: not in a subfolder"):
        load(tmp_path, class_field="folder")
    with pytest.raises(DataError, match=r"classes are required: .* outside subfolders"):
        load(tmp_path, require_classes=True)


def test_captions_of_txt_files_and_metadata(tmp_path: Path, pixels: Pixels) -> None:
    for name in ("a/1.png", "a/2.png", "3.png"):
        add(tmp_path / name, pixels)
    (tmp_path / "a" / "1.txt").write_text("\ufeffa cat\non a  mat\n", encoding="utf-8")
    (tmp_path / "3.txt").write_text("une fenêtre")
    row = {"file_name": "2.png", "text": ["", "a dog", "a second caption"]}
    (tmp_path / "a" / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    assert load(tmp_path).captions == ["une fenêtre", "a cat on a mat", "a dog"]


def test_captions_and_classes_of_csv(tmp_path: Path, pixels: Pixels) -> None:
    for name in ("1.png", "2.png"):
        add(tmp_path / name, pixels)
    (tmp_path / "metadata.csv").write_text(
        'file_name,title,label\n1.png,"a ""quoted"", title",3\n2.png,two,0\n'
    )
    dataset = load(tmp_path, caption_field="title")
    assert dataset.captions == ['a "quoted", title', "two"]
    assert dataset.class_labels == [3, 0]
    assert dataset.class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("caption_field", "title", "caption_field='title' is not in the metadata; there are cap"),
        ("class_field", "species", "class_field='species' is not in the metadata; there are"),
    ],
)
def test_a_field_that_is_not_there(
    captioned_folder: Path, option: str, value: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(captioned_folder, **{option: value})


def test_fields_without_metadata(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"caption_field='title' asks .* no metadata\.jsonl or"):
        load(image_folder, caption_field="title")
    with pytest.raises(DataError, match=r"captions are required: .* nor \.txt files"):
        load(image_folder, require_captions=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "00.png"}\n{oops', r"metadata\.jsonl, line 2: not JSON"),
        ("metadata.jsonl", '["00.png"]', r"line 1: expected a row with a file_name"),
        ("metadata.jsonl", '{"caption": "x"}', "expected a row with a file_name"),
        ("metadata.csv", "name,caption\n00.png,x\n", r"metadata\.csv, line 2: expected a row"),
        ("metadata.jsonl", "caf\xe9", "not UTF-8"),
        ("00.txt", "caf\xe9", r"00\.txt: not UTF-8"),
    ],
)
def test_damaged_metadata_is_named(image_folder: Path, name: str, text: str, message: str) -> None:
    (image_folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load(image_folder)


def test_metadata_of_missing_images(
    captioned_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (captioned_folder / "03.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(load(captioned_folder)) == 11
    assert any("03.png: named in the metadata" in text for text in caplog.messages)
    with pytest.raises(DataError, match=r"03\.png: named in the metadata"):
        load(captioned_folder, strict=True)


@pytest.mark.parametrize("kind", [1.5, [1], -2])
def test_class_values_that_are_no_classes(captioned_folder: Path, kind: Any) -> None:
    path = captioned_folder / "metadata.jsonl"
    path.write_text(path.read_text().replace('"kind": "b"', f'"kind": {json.dumps(kind)}'))
    with pytest.raises(DataError, match="class"):
        load(captioned_folder, class_field="kind")


@pytest.mark.parametrize("test_folder", ["test", "val", "validation"])
def test_train_and_test_folders_are_the_splits(
    tmp_path: Path, pixels: Pixels, test_folder: str
) -> None:
    for name in ("train/a/1.png", "train/b/2.png", f"{test_folder}/b/3.png"):
        add(tmp_path / name, pixels)
    assert load(tmp_path).names == ["a/1.png", "b/2.png"]
    assert load(tmp_path, split="test").names == ["b/3.png"]
    assert load(tmp_path).class_names == ["a", "b"]
    held = load(tmp_path, holdout_fraction=0.5, split="test").names
    assert held in (["a/1.png"], ["b/2.png"])


def test_classes_have_the_same_numbers_in_both_folders(tmp_path: Path, pixels: Pixels) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png"):
        add(tmp_path / name, pixels)
    test = load(tmp_path, split="test")
    assert test.class_names == ["a", "b"]
    assert test.class_labels == [1]
