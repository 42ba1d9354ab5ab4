"""What every source is brought to: a table of undecoded images, captions and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastldm.data.config import DataConfig
from fastldm.data.decode import ImageSource
from fastldm.errors import DataError

if TYPE_CHECKING:
    import datasets

CAPTION_FIELDS = ("caption", "text", "txt", "prompt")
CLASS_FIELDS = ("label", "labels", "class", "cls", "class_label")
_IMAGE_FIELDS = ("image", "img", "jpg", "jpeg", "png", "webp", "tif", "tiff", "npy", "picture")


@dataclass(frozen=True)
class Fields:
    """Where image, caption, class and name are in a row."""

    image: str
    caption: str | None = None
    label: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ClassMap:
    """Class names, and the number of each value of the class column."""

    names: tuple[str, ...]
    numbers: Mapping[Any, int] | None = None
    """``None``: the column holds the numbers themselves."""

    def number(self, value: Any) -> int | None:
        """The number of a class value; ``None`` when it is missing.

        Raises:
            DataError: the value is none of the known classes.
        """
        if value is None or value == "":
            return None
        if self.numbers is not None and value in self.numbers:
            return self.numbers[value]
        if self.numbers is None and isinstance(value, int | np.integer):
            if value == -1:
                return None
            if 0 <= value < len(self.names):
                return int(value)
        shown = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
        raise DataError(f"class {value!r} is not one of the {len(self.names)} classes: {shown}")


@dataclass
class ImageTable:
    """The rows of a source, undecoded, before images are held out of it."""

    rows: datasets.Dataset | datasets.IterableDataset
    fields: Fields
    origin: str
    """What messages call the source."""
    classes: ClassMap | None = None
    pad_to_square: bool = False
    own_split: bool = False
    """Whether the source itself has a test split; the rows are then those of the asked split."""
    split_keys: Sequence[str] | None = None
    """What decides the side of each row in a split; by default its name."""
    why_no_captions: str = "the source has none"
    why_no_classes: str = "the source has none"
    notes: list[str] = field(default_factory=list)
    """Warnings to give once."""

    def image(self, row: Mapping[str, Any]) -> ImageSource:
        """The undecoded image of a row."""
        return image_source(lookup(row, self.fields.image))

    def name(self, row: Mapping[str, Any], index: int) -> str:
        """The name of a row: its own, its file's, or its number."""
        if self.fields.name is not None and row.get(self.fields.name):
            return str(row[self.fields.name])
        value = lookup(row, self.fields.image)
        path = value.get("path") if isinstance(value, dict) else None
        return str(path) if path else f"row {index}"

    def caption(self, row: Mapping[str, Any]) -> str | None:
        """The caption of a row, or ``None`` when it is missing or empty."""
        column = self.fields.caption
        return None if column is None else clean_caption(lookup(row, column))

    def label(self, row: Mapping[str, Any]) -> int | None:
        """The class number of a row, or ``None`` when it is missing."""
        if self.fields.label is None or self.classes is None:
            return None
        return self.classes.number(lookup(row, self.fields.label))

    def all_names(self) -> list[str]:
        """The name of every row, without reading the images."""
        import datasets

        count = self.rows.num_rows
        if self.fields.name is not None:
            return list(map(str, column_values(self.rows, self.fields.name)))
        paths: list[str | None] = [None] * count
        if isinstance(self.rows.features[self.fields.image], datasets.Image):
            path = f"{self.fields.image}.path"
            columns = self.rows.select_columns([self.fields.image]).flatten()
            paths = columns.select_columns([path]).to_dict()[path]
        return [path or f"row {number}" for number, path in enumerate(paths)]

    def all_captions(self) -> list[str | None] | None:
        """The caption of every row, or ``None`` when there is no such column."""
        if self.fields.caption is None:
            return None
        return [clean_caption(value) for value in column_values(self.rows, self.fields.caption)]

    def all_labels(self) -> list[int | None] | None:
        """The class number of every row, or ``None`` when there is no such column."""
        if self.fields.label is None or self.classes is None:
            return None
        return list(map(self.classes.number, column_values(self.rows, self.fields.label)))


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a field inside one (``json.caption``)."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def column_values(rows: datasets.Dataset, path: str) -> list[Any]:
    """All values of a column, or of a field inside one; nothing else is read."""
    root = path if path in rows.features else path.split(".")[0]
    values = rows.select_columns([root]).to_dict()[root]
    return values if root == path else [lookup({root: value}, path) for value in values]


def image_source(value: Any) -> ImageSource:
    """Bytes, path or array of an image cell.

    Raises:
        ValueError: the cell is empty.
        DataError: the cell holds something else.
    """
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, list):
        value = np.asarray(value)
    if isinstance(value, bytes | str | np.ndarray):
        return value
    if value is None:
        raise ValueError("there is no image")
    raise DataError(f"expected an encoded image, a path or an array, got {type(value).__name__}")


def clean_caption(value: Any) -> str | None:
    """A caption with its white space collapsed; of several, the first that is not empty."""
    if isinstance(value, list | tuple):
        return next((text for text in map(clean_caption, value) if text), None)
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        return None
    return " ".join(value.split()) or None


def choose_fields(features: Mapping[str, Any], config: DataConfig, origin: str) -> Fields:
    """Find image, caption and class among the columns of a Hugging Face data set.

    Raises:
        DataError: a column that the config names is not there, or no column looks like an image.
    """
    image = config.image_field or _find_image(features)
    if image is None:
        raise DataError(
            f"{origin}: no image column among {_listed(features)}; name it with image_field"
        )
    for option, column in (
        ("image_field", image),
        ("caption_field", config.caption_field),
        ("class_field", config.class_field),
    ):
        if column is not None and not _has_path(features, column):
            raise DataError(
                f"{origin}: {option}={column!r} is not a column; there are {_listed(features)}"
            )
    return Fields(
        image=image,
        caption=config.caption_field or _first(CAPTION_FIELDS, features, _is_text),
        label=config.class_field or _first(CLASS_FIELDS, features, _is_class),
        name="__key__" if "__key__" in features else None,
    )


def class_map(values: Iterable[Any], config: DataConfig, origin: str) -> ClassMap:
    """Number the classes that occur, sorted by name; integers keep their value.

    Raises:
        DataError: values are neither integers nor strings, are negative, or are not among
            ``config.class_names``.
    """
    present = [value for value in values if value is not None and value != "" and value != -1]
    other = next((v for v in present if not isinstance(v, int | np.integer | str)), None)
    if other is not None:
        raise DataError(f"{origin}: a class must be an integer or a string, got {other!r}")
    found = set(present)
    if all(isinstance(value, int | np.integer) for value in found):
        if found and min(found) < 0:
            raise DataError(f"{origin}: class {min(found)} is negative")
        count = int(max(found, default=-1)) + 1
        names = config.class_names or tuple(map(str, range(count)))
        if count > len(names):
            raise DataError(
                f"{origin}: class {count - 1} does not fit the {len(names)} class_names"
            )
        return ClassMap(names)
    if not all(isinstance(value, str) for value in found):
        raise DataError(f"{origin}: classes must be all integers or all strings")
    names = config.class_names or tuple(sorted(found))
    unknown = sorted(found - set(names))
    if unknown:
        raise DataError(f"{origin}: class {unknown[0]!r} is not in class_names {list(names)}")
    return ClassMap(names, {name: number for number, name in enumerate(names)})


def in_holdout(key: str, fraction: float, seed: int) -> bool:
    """Whether the hash of a name falls in the held-out share."""
    return _share(key, seed) < fraction


def split_rows(keys: Sequence[str], split: str, fraction: float, seed: int) -> np.ndarray:
    """Row numbers of one side of a split; with 2 rows or more, neither side is empty."""
    shares = np.array([_share(key, seed) for key in keys])
    held_out = shares < fraction
    if len(keys) > 1 and fraction > 0:
        if not held_out.any():
            held_out = shares == shares.min()
        elif held_out.all():
            held_out = shares != shares.max()
    return np.flatnonzero(held_out if split == "test" else ~held_out)


def _share(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _find_image(features: Mapping[str, Any]) -> str | None:
    import datasets

    typed = (name for name, kind in features.items() if isinstance(kind, datasets.Image))
    return next(typed, None) or _first(_IMAGE_FIELDS, features, lambda kind: True)


def _first(names: Iterable[str], features: Mapping[str, Any], fits: Any) -> str | None:
    return next((name for name in names if name in features and fits(features[name])), None)


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _is_class(kind: Any) -> bool:
    import datasets

    dtype = str(getattr(kind, "dtype", None))
    return isinstance(kind, datasets.ClassLabel) or _is_text(kind) or "int" in dtype


def _has_path(features: Mapping[str, Any], path: str) -> bool:
    if path in features:
        return True
    kind: Any = features
    for part in path.split("."):
        if not isinstance(kind, Mapping) or part not in kind:
            return False
        kind = kind[part]
    return True


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
