"""A folder of images with captions in metadata or text files and classes as subfolders."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastldm.data.config import DataConfig
from fastldm.data.sources.table import (
    CAPTION_FIELDS,
    CLASS_FIELDS,
    ClassMap,
    Fields,
    ImageTable,
    class_map,
    clean_caption,
    lookup,
)
from fastldm.errors import DataError

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm",
    ".pgm", ".jp2", ".avif", ".npy",
))
# fmt: on
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}

Metadata = dict[Path, dict[str, Any]]


def read_folder(folder: Path, config: DataConfig, split: str) -> ImageTable:
    """The images of a folder, sorted by their path in it.

    Hidden files and folders, and files that are not images by their suffix, are passed over;
    links are followed.

    Raises:
        DataError: the folder holds no image, its metadata cannot be read, or a field that the
            config names is not there.
    """
    import datasets

    whole = folder
    folder, own_split = _split_folder(folder, config, split)
    files = list(_image_files(folder))
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder}: the folder holds no images (files ending in {suffixes})")
    metadata = _read_metadata(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    captions, why_no_captions = _captions(folder, files, metadata, config)
    labels, why_no_classes = _labels(folder, files, metadata, config)
    columns: dict[str, list[Any]] = {"image": [str(file) for file in files], "name": names}
    classes: ClassMap | None = None
    if captions is not None:
        columns["caption"] = captions
    if labels is not None:
        columns["class"] = labels
        if own_split and split == "test":
            classes = read_folder(whole, config, "train").classes
        else:
            classes = class_map(labels, config, str(folder))
    notes = [
        f"{path}: named in the metadata, but there is no such image"
        for path in sorted(set(metadata) - set(files))
    ]
    if notes and config.strict:
        raise DataError(notes[0])
    return ImageTable(
        rows=datasets.Dataset.from_dict(columns),
        fields=Fields(
            image="image",
            name="name",
            caption="caption" if captions is not None else None,
            label="class" if labels is not None else None,
        ),
        origin=str(folder),
        classes=classes,
        own_split=own_split,
        why_no_captions=why_no_captions,
        why_no_classes=why_no_classes,
        notes=notes,
    )


def _split_folder(folder: Path, config: DataConfig, split: str) -> tuple[Path, bool]:
    """The subfolder of a split, when the folder has one for training and one for testing."""
    found = {
        name: next((folder / entry for entry in entries if (folder / entry).is_dir()), None)
        for name, entries in _SPLIT_FOLDERS.items()
    }
    if found["train"] is None or found["test"] is None:
        return folder, False
    if config.holdout_fraction is not None:
        return found["train"], False
    chosen = found[split]
    assert chosen is not None
    return chosen, True


def _image_files(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    yield from sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _read_metadata(folder: Path) -> Metadata:
    """Rows of every metadata file under `folder`, by the image that they are about."""
    rows: Metadata = {}
    for name in METADATA_NAMES:
        for file in sorted(folder.rglob(name)):
            for where, row in _metadata_rows(file):
                if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                    raise DataError(f"{where}: expected a row with a file_name, got {row!r:.80}")
                rows[file.parent / row["file_name"]] = row
    return rows


def _metadata_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error})") from None
    if file.suffix == ".csv":
        for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
            yield f"{file}, line {number}", row
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"{file}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not JSON ({error})") from None


def _captions(
    folder: Path, files: list[Path], metadata: Metadata, config: DataConfig
) -> tuple[list[str | None] | None, str]:
    column = config.caption_field
    if column is not None and column != "txt":
        _check_column(folder, metadata, "caption_field", column)
    elif column is None:
        column = _first_column(metadata, CAPTION_FIELDS)
    captions: list[str | None] = [None] * len(files)
    if column is not None and column != "txt":
        captions = [clean_caption(lookup(metadata.get(file, {}), column)) for file in files]
    if config.caption_field in (None, "txt"):
        captions = [
            caption or _text_beside(file) for caption, file in zip(captions, files, strict=True)
        ]
    if any(captions) or config.caption_field is not None:
        return captions, ""
    return None, (
        f"{folder} has neither a {' or '.join(METADATA_NAMES)} with a column "
        f"{' or '.join(CAPTION_FIELDS)}, nor .txt files beside the images"
    )


def _text_beside(file: Path) -> str | None:
    try:
        return clean_caption(file.with_suffix(".txt").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{file.with_suffix('.txt')}: not UTF-8 text ({error})") from None


def _labels(
    folder: Path, files: list[Path], metadata: Metadata, config: DataConfig
) -> tuple[list[Any] | None, str]:
    column = config.class_field
    if column is not None and column != "folder":
        _check_column(folder, metadata, "class_field", column)
    elif column is None:
        column = _first_column(metadata, CLASS_FIELDS)
    if column is not None and column != "folder":
        return _integers([lookup(metadata.get(file, {}), column) for file in files]), ""
    parts = [file.relative_to(folder).parts for file in files]
    if all(len(entry) > 1 for entry in parts):
        return [entry[0] for entry in parts], ""
    why = f"{folder} has images outside subfolders, and no metadata with a class"
    if column == "folder":
        loose = next(file for file, entry in zip(files, parts, strict=True) if len(entry) == 1)
        raise DataError(f"{loose}: not in a subfolder, but class_field='folder' asks for one")
    return None, why


def _integers(values: list[Any]) -> list[Any]:
    """CSV gives digits as strings; when all are digits they are the numbers of the classes."""
    present = [value for value in values if value not in (None, "")]
    if present and all(isinstance(value, str) and value.isdecimal() for value in present):
        return [int(value) if value not in (None, "") else None for value in values]
    return values


def _first_column(metadata: Metadata, names: tuple[str, ...]) -> str | None:
    present = {name for row in metadata.values() for name in row}
    return next((name for name in names if name in present), None)


def _check_column(folder: Path, metadata: Metadata, option: str, column: str) -> None:
    present = sorted({name for row in metadata.values() for name in row if name is not None})
    if not metadata:
        raise DataError(
            f"{folder}: {option}={column!r} asks for a metadata column, but there is no "
            f"{' or '.join(METADATA_NAMES)}"
        )
    if column.split(".")[0] not in present:
        raise DataError(
            f"{folder}: {option}={column!r} is not in the metadata; there are {', '.join(present)}"
        )
