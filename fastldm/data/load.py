"""`load_images`: any source as a data set, with its captions and classes checked."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from fastldm.data.config import DataConfig
from fastldm.data.images import ImageDataset
from fastldm.data.sources import ImageTable, read_source
from fastldm.data.sources.table import split_rows
from fastldm.data.streaming import StreamingImageDataset
from fastldm.errors import ConfigError, DataError, NothingHeldOutError

logger = logging.getLogger(__name__)

Split = Literal["train", "test"]
_EMOJI_HOLDOUT = 0.1


def load_images(
    config: DataConfig, *, split: Split = "train", augment: bool | None = None
) -> ImageDataset | StreamingImageDataset:
    """Open the source of a config.

    Args:
        config: what to load.
        split: ``train``, or the held-out images, ``test``.
        augment: whether to crop at random and flip as the config says; by default only for
            ``train``. Without it every epoch gives the same pixels.

    Returns:
        An `ImageDataset`, or a `StreamingImageDataset` when the config or the source asks for
        streaming.

    Raises:
        DataError: the source is missing, empty or damaged; captions or classes are required and
            missing; an image is too small; nothing is held out and ``test`` is asked for.
        ConfigError: `split` is neither ``train`` nor ``test``.
    """
    import datasets

    if split not in get_args(Split):
        raise ConfigError(f"split must be 'train' or 'test', got {split!r}")
    source = read_source(config, split)
    for note in source.notes:
        logger.warning("%s", note)
    fraction = _holdout_fraction(config, source)
    if split == "test" and not source.own_split and not fraction:
        raise NothingHeldOutError(
            f"{source.origin}: no images are held out for split='test'; set holdout_fraction, for "
            "example 0.05"
        )
    _require_fields(source, config)
    augment = split == "train" if augment is None else augment
    if isinstance(source.rows, datasets.Dataset):
        source = _check_captions(source, config)
        source = _check_labels(source, config)
    if config.streams:
        return StreamingImageDataset(source, config, split, fraction, augment)
    source.rows = source.rows.select_columns(_columns(source))
    rows = np.arange(source.rows.num_rows)
    if fraction:
        keys = source.split_keys or source.all_names()
        rows = split_rows(keys, split, fraction, config.split_seed)
    if not len(rows):
        raise DataError(f"{source.origin}: no image is left for split={split!r}")
    return ImageDataset(source, config, rows, augment)


def _holdout_fraction(config: DataConfig, source: ImageTable) -> float:
    if source.own_split:
        return 0.0
    if config.holdout_fraction is None:
        return _EMOJI_HOLDOUT if config.source == "emoji" else 0.0
    return config.holdout_fraction


def _require_fields(source: ImageTable, config: DataConfig) -> None:
    if _wants_captions(config) and source.fields.caption is None:
        raise DataError(f"{source.origin}: captions are required: {source.why_no_captions}")
    if _wants_classes(config) and (source.fields.label is None or source.classes is None):
        raise DataError(f"{source.origin}: classes are required: {source.why_no_classes}")


def _wants_captions(config: DataConfig) -> bool:
    return config.require_captions or config.caption_field is not None


def _wants_classes(config: DataConfig) -> bool:
    return config.require_classes or config.class_field is not None


def _check_captions(source: ImageTable, config: DataConfig) -> ImageTable:
    """Stop at missing captions when they are required, and otherwise do without any."""
    if not _some_missing(source, source.all_captions(), "caption", _wants_captions(config)):
        return source
    return replace(source, fields=replace(source.fields, caption=None))


def _check_labels(source: ImageTable, config: DataConfig) -> ImageTable:
    if not _some_missing(source, source.all_labels(), "class", _wants_classes(config)):
        return source
    return replace(source, fields=replace(source.fields, label=None))


def _some_missing(source: ImageTable, values: list[Any] | None, what: str, required: bool) -> bool:
    missing = [number for number, value in enumerate(values or ()) if value is None]
    if values is None or not missing:
        return False
    names = source.all_names()
    shown = ", ".join(names[number] for number in missing[:5])
    message = f"{source.origin}: {what} missing for {len(missing)} of {len(values)} images: {shown}"
    if required:
        raise DataError(message + (", …" if len(missing) > 5 else ""))
    logger.warning("%s; going on without any %s", message, what)
    return True


def _columns(source: ImageTable) -> list[str]:
    fields = source.fields
    wanted = (fields.image, fields.caption, fields.label, fields.name)
    present = source.rows.features
    roots = (path if path in present else path.split(".")[0] for path in wanted if path)
    return list(dict.fromkeys(roots))
