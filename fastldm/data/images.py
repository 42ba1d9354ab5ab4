"""Data sets of images with random access."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastldm.data.config import DataConfig
from fastldm.data.decode import decode_image, image_size
from fastldm.data.sources.table import ImageTable
from fastldm.data.transforms import (
    Augmentation,
    check_size,
    cut,
    finish,
    position,
    prepare,
    resize,
)
from fastldm.errors import DataError

logger = logging.getLogger(__name__)

_HEADERS_CHECKED_AT_LOAD = 1000
"""Images whose header is read at once, so that a wrong resolution shows before training."""


def shared_zeros(size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Zeros that worker processes see change."""
    zeros = torch.zeros(size, dtype=dtype)
    zeros.share_memory_()
    return zeros


class UnreadableImageError(Exception):
    """An image that the decoder refused; never leaves this package."""


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of one split of a source, decoded when asked for.

    An item is a dict with ``pixel_values`` (float32 [C, H, W] in −1…1), ``name`` (str), ``index``
    (int, its position here) and, where the source has them, ``caption`` (str) and
    ``class_label`` (int).

    Random crops and flips depend on (seed, epoch, index) alone: call `set_epoch` before each
    epoch and a resumed run sees the same pixels, whatever the number of workers. The epoch is in
    shared memory, so that workers which outlive an epoch follow.

    An unreadable image is replaced by the next readable one, named in a warning and listed in
    `skipped`; with ``config.strict`` it raises DataError. An image that is readable but cannot
    serve (too small, wrong channels, values out of range) always raises.
    """

    def __init__(
        self, source: ImageTable, config: DataConfig, rows: np.ndarray, augment: bool
    ) -> None:
        self.config = config
        self._source = source
        self._rows = rows
        self._augment = augment
        self._pad = source.pad_to_square or config.crop == "pad"
        self._epoch = shared_zeros(1)
        self._unreadable = shared_zeros(len(rows), torch.bool)
        self._cache: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
        self._cache_room = self._cache_size()
        self._first_tiles, self._tiled_sizes = self._check_headers()

    def __len__(self) -> int:
        return self._first_tiles[-1] if self._first_tiles else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        index %= len(self)
        photo, tile = self._locate(index)
        for step in range(len(self._rows)):
            candidate = (photo + step) % len(self._rows)
            if self._unreadable[candidate]:
                continue
            try:
                return self._item(candidate, tile if step == 0 else 0, drawn_for=index)
            except UnreadableImageError as error:
                self._skip(candidate, error)
        raise DataError(f"{self._source.origin}: none of its {len(self._rows)} images is readable")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cache_room": self._cache_size()}

    def _cache_size(self) -> int:
        return self.config.cache_megabytes * 2**20 // max(1, self.config.num_workers)

    @property
    def epoch(self) -> int:
        """The epoch that random crops and flips are drawn for."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """Choose the random crops and flips of an epoch, also in running workers."""
        self._epoch.fill_(epoch)

    @property
    def names(self) -> list[str]:
        """Name of each item; the tiles of one photograph share its name."""
        return self._per_item(self._source.all_names())

    @property
    def captions(self) -> list[str] | None:
        """Caption of each item, or ``None`` when the source has none."""
        captions = self._source.all_captions()
        return None if captions is None else self._per_item(captions)

    @property
    def class_labels(self) -> list[int] | None:
        """Class of each item, or ``None`` when the source has none."""
        labels = self._source.all_labels()
        return None if labels is None else self._per_item(labels)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes by their number, or ``None`` when the source has none."""
        if self._source.fields.label is None or self._source.classes is None:
            return None
        return list(self._source.classes.names)

    @property
    def skipped(self) -> list[str]:
        """Names of the images found unreadable so far, by this process or its workers."""
        return [self._name(photo) for photo in torch.nonzero(self._unreadable).flatten().tolist()]

    @property
    def skipped_count(self) -> int:
        """How many images were found unreadable so far."""
        return int(self._unreadable.sum())

    def _row(self, photo: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._source.rows[int(self._rows[photo])]
        return row

    def _name(self, photo: int) -> str:
        return self._source.name(self._row(photo), int(self._rows[photo]))

    def _per_item(self, values: list[Any]) -> list[Any]:
        if not self._first_tiles:
            return [values[row] for row in self._rows]
        return [values[self._rows[self._locate(index)[0]]] for index in range(len(self))]

    def _locate(self, index: int) -> tuple[int, int]:
        """The photograph of an item, and the number of its tile there."""
        if not self._first_tiles:
            return index, 0
        photo = bisect_right(self._first_tiles, index) - 1
        return photo, index - self._first_tiles[photo]

    def _item(self, photo: int, tile: int, drawn_for: int) -> dict[str, Any]:
        augmentation = (
            Augmentation.draw(self.config, self.epoch, drawn_for)
            if self._augment
            else Augmentation()
        )
        array, about = self._prepared(photo)
        if self.config.tile is not None:
            array = self._cut_tile(array, photo, tile, augmentation)
        return {
            "pixel_values": finish(array, self.config, augmentation),
            "index": self._first_tiles[photo] + tile if self._first_tiles else photo,
            **about,
        }

    def _prepared(self, photo: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The image before augmentation, with its name, caption and class."""
        if photo in self._cache:
            return self._cache[photo]
        row = self._row(photo)
        name = self._source.name(row, int(self._rows[photo]))
        array = decode_and_prepare(self._source, row, name, self.config)
        about = {"name": name, **conditions(self._source, row)}
        if array.nbytes <= self._cache_room:
            self._cache[photo] = (array, about)
            self._cache_room -= array.nbytes
        return array, about

    def _cut_tile(
        self, array: np.ndarray, photo: int, tile: int, augmentation: Augmentation
    ) -> np.ndarray:
        side = self.config.tile or 0
        height, width = array.shape[:2]
        opened_height, opened_width = self._tiled_sizes[photo]
        if (height, width) != (opened_height, opened_width):
            raise DataError(
                f"{self._source.origin}: {self._name(photo)}: the image is {width}×{height} "
                f"pixels, but was {opened_width}×{opened_height} by its header when the data set "
                "was opened"
            )
        if augmentation.top is not None and augmentation.left is not None:
            top = position(augmentation.top, height - side)
            left = position(augmentation.left, width - side)
        else:
            row, column = divmod(tile, width // side)
            top = height % side // 2 + row * side
            left = width % side // 2 + column * side
        resolution = self.config.resolution
        square = cut(array, top, left, side)
        return resize(square, resolution, resolution, self.config.interpolation)

    def _check_headers(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Read sizes before anything is decoded.

        Returns the number of the first tile of each photograph (and of the one past the last),
        and the size of each photograph; two empty lists without tiling.
        """
        side = self.config.tile
        checked = len(self._rows) if side else min(len(self._rows), _HEADERS_CHECKED_AT_LOAD)
        first_tiles, sizes = [0], []
        for photo in range(checked):
            size = self._header_size(photo)
            if side:
                first_tiles.append(first_tiles[-1] + (size[0] // side) * (size[1] // side))
                sizes.append(size)
        if self.skipped_count == len(self._rows):
            raise DataError(
                f"{self._source.origin}: none of its {len(self._rows)} images is readable, "
                f"the first being {self._name(0)}"
            )
        return (first_tiles, sizes) if side else ([], [])

    def _header_size(self, photo: int) -> tuple[int, int]:
        """Height and width; 0 and 0 of an unreadable image."""
        row = self._row(photo)
        name = self._source.name(row, int(self._rows[photo]))
        try:
            size = image_size(self._source.image(row))
            check_size(*size, self.config, self._pad)
        except DataError as error:
            raise DataError(f"{self._source.origin}: {name}: {error}") from None
        except Exception as error:  # decoders raise many types on damaged files
            self._skip(photo, UnreadableImageError(f"{name}: {_reason(error)}"))
            return 0, 0
        return size

    def _skip(self, photo: int, error: UnreadableImageError) -> None:
        so_far = f"{self.skipped_count + 1} of {len(self._rows)}"
        report_unreadable(self._source, error, self.config, so_far)
        self._unreadable[photo] = True


def decode_and_prepare(
    source: ImageTable, row: Mapping[str, Any], name: str, config: DataConfig
) -> np.ndarray:
    """Decode the image of a row and scale it.

    Raises:
        DataError: the image does not fit the config; names it.
        UnreadableImageError: the image is missing or damaged; names it.
    """
    pad = source.pad_to_square or config.crop == "pad"
    try:
        array = decode_image(source.image(row), config.channels, config.value_range)
        return prepare(array, config, pad)
    except DataError as error:
        raise DataError(f"{source.origin}: {name}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types on damaged files
        raise UnreadableImageError(f"{name}: {_reason(error)}") from error


def conditions(source: ImageTable, row: Mapping[str, Any]) -> dict[str, Any]:
    """``caption`` and ``class_label`` of a row, where the source has them."""
    values = {"caption": source.caption(row), "class_label": source.label(row)}
    return {name: value for name, value in values.items() if value is not None}


def report_unreadable(
    source: ImageTable, error: Exception, config: DataConfig, so_far: str
) -> None:
    """Warn of an unreadable image and how many there were, or raise DataError when strict."""
    message = f"{source.origin}: unreadable image {error}"
    if config.strict:
        raise DataError(f"{message}; remove it, or leave out strict to skip it") from error
    logger.warning("%s; skipped, %s so far", message, so_far)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
