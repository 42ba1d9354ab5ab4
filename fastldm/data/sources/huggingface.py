"""Parquet files, webdataset shards, saved data sets and the hub, through ``datasets``."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastldm.data.config import DataConfig
from fastldm.data.sources.table import (
    ClassMap,
    Fields,
    ImageTable,
    choose_fields,
    class_map,
    column_values,
)
from fastldm.errors import DataError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TEST_SPLITS = ("test", "validation", "val", "valid")


def read_parquet(pattern: str, config: DataConfig) -> ImageTable:
    """Rows of one or many parquet files, in the order of their names."""
    import datasets

    files = _matching_files(pattern, (".parquet",))
    rows = _guarded(
        pattern,
        lambda: datasets.load_dataset(
            "parquet", data_files={"train": files}, split="train", streaming=config.streaming
        ),
    )
    return _table(rows, config, pattern)


def read_webdataset(pattern: str, config: DataConfig) -> ImageTable:
    """A stream over tar shards in which the files of one item share a name."""
    import datasets

    files = _matching_files(pattern, (".tar", ".tar.gz", ".tgz"))
    rows = _guarded(
        pattern,
        lambda: datasets.load_dataset(
            "webdataset", data_files={"train": files}, split="train", streaming=True
        ),
    )
    return _table(rows, config, pattern)


def read_saved(folder: Path, config: DataConfig, split: str) -> ImageTable:
    """A folder that ``save_to_disk`` of a data set or of a dict of splits wrote."""
    import datasets

    saved = _guarded(str(folder), lambda: datasets.load_from_disk(str(folder)))
    if not isinstance(saved, Mapping):
        return _table(saved, config, str(folder))
    train, chosen, own_split = choose_split(saved, config, split, str(folder))
    return _table(saved[chosen], config, str(folder), own_split, lambda: saved[train])


def read_hub(name: str, config: DataConfig, split: str) -> ImageTable:
    """A data set of the Hugging Face hub; nothing of it is run."""
    import datasets

    origin = f"hub:{name}"
    splits = _guarded(
        origin,
        lambda: datasets.get_dataset_split_names(
            name, config_name=config.subset, revision=config.revision
        ),
    )

    def load(chosen: str) -> Any:
        return _guarded(
            origin,
            lambda: datasets.load_dataset(
                name,
                config.subset,
                split=chosen,
                revision=config.revision,
                streaming=config.streaming,
            ),
        )

    train, chosen, own_split = choose_split(splits, config, split, origin)
    return _table(load(chosen), config, origin, own_split, lambda: load(train))


def choose_split(
    available: Iterable[str], config: DataConfig, split: str, origin: str
) -> tuple[str, str, bool]:
    """The train split, the one to read, and whether the source itself has a test split."""
    names = list(available)
    train = "train" if "train" in names else names[0] if len(names) == 1 else None
    if train is None:
        raise DataError(f"{origin}: there is no train split; there are {', '.join(names)}")
    test = next((name for name in _TEST_SPLITS if name in names), None)
    if config.holdout_fraction is not None or test is None:
        return train, train, False
    return train, (test if split == "test" else train), True


def _table(
    rows: Any,
    config: DataConfig,
    origin: str,
    own_split: bool = False,
    training_rows: Callable[[], Any] | None = None,
) -> ImageTable:
    """Find the columns; classes without names are numbered as they occur in the train split."""
    import datasets

    features = rows.features
    if features is None:
        raise DataError(f"{origin}: the columns of the stream cannot be told")
    if hasattr(rows, "num_rows") and rows.num_rows == 0:
        raise DataError(f"{origin}: the data set is empty")
    fields = choose_fields(features, config, origin)
    if isinstance(features.get(fields.image), datasets.Image):
        rows = rows.cast_column(fields.image, datasets.Image(decode=False))
    return ImageTable(
        rows=rows,
        fields=fields,
        origin=origin,
        classes=_classes(rows, fields, config, origin, training_rows or (lambda: rows)),
        own_split=own_split,
        why_no_captions=f"none of its columns is a caption: {', '.join(features)}",
        why_no_classes=f"none of its columns is a class: {', '.join(features)}",
    )


def _classes(
    rows: Any,
    fields: Fields,
    config: DataConfig,
    origin: str,
    training_rows: Callable[[], Any],
) -> ClassMap | None:
    import datasets

    if fields.label is None:
        return None
    kind = rows.features.get(fields.label)
    if isinstance(kind, datasets.ClassLabel) and kind.names:
        return ClassMap(config.class_names or tuple(kind.names))
    if isinstance(rows, datasets.Dataset):
        return class_map(column_values(training_rows(), fields.label), config, origin)
    if config.class_names is not None:
        numbers: dict[Any, int] = {name: i for i, name in enumerate(config.class_names)}
        numbers.update({i: i for i in range(len(config.class_names))})
        return ClassMap(config.class_names, numbers)
    if config.class_field is not None or config.require_classes:
        raise DataError(
            f"{origin}: a stream does not tell which values {fields.label!r} has; list them in "
            "class_names"
        )
    return None


def _matching_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        files = [str(path) for path in expanded.rglob("*") if path.name.endswith(suffixes)]
    else:
        files = [path for part in expand_range(str(expanded)) for path in glob.glob(part)]
    if not files:
        raise DataError(f"{pattern}: no such files (looked for {', '.join(suffixes)})")
    return sorted(files)


def expand_range(pattern: str) -> list[str]:
    """``a-{08..10}.tar`` as a-08.tar, a-09.tar and a-10.tar, as webdataset writes shard names."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [
        path
        for number in range(int(first), int(last) + 1)
        for path in expand_range(f"{before}{number:0{len(first)}d}{after}")
    ]


def _guarded(origin: str, load: Any) -> Any:
    """Call into ``datasets``, whose errors on bad input are of many types, and name the source."""
    try:
        return load()
    except Exception as error:  # readers raise their own types on damaged files
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines()
        reason = f"{type(cause).__name__}: {lines[0] if lines else ''}"
        raise DataError(f"{origin}: cannot be read ({reason})") from error
