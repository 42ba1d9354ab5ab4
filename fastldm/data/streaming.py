"""Data sets of images read in order, without random access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from fastldm.data.config import DataConfig
from fastldm.data.images import (
    UnreadableImageError,
    conditions,
    decode_and_prepare,
    report_unreadable,
    shared_zeros,
)
from fastldm.data.sources.table import ImageTable, in_holdout
from fastldm.data.transforms import Augmentation, finish
from fastldm.errors import DataError

Row = tuple[int, Mapping[str, Any]]


class StreamingImageDataset(IterableDataset[dict[str, Any]]):
    """Images of one split of a source, read from its beginning in every epoch.

    Items are those of `ImageDataset`; ``index`` is the position in this epoch's order. The order
    is that of the source through a shuffle buffer seeded with (seed, epoch). Workers and
    processes all read the undecoded stream and each decodes its own batches, so that the order
    of batches is the same for any number of workers and a resumed run skips without decoding;
    the price is that the source is read once a worker.

    An unreadable image is replaced by the next readable one of its batch; with ``config.strict``
    it raises DataError.
    """

    def __init__(
        self, source: ImageTable, config: DataConfig, split: str, fraction: float, augment: bool
    ) -> None:
        import datasets

        self.config = config
        self.shuffle = augment
        if isinstance(source.rows, datasets.Dataset):
            source = replace(source, rows=source.rows.to_iterable_dataset())
        self._source = source
        self._split = split
        self._fraction = fraction
        self._augment = augment
        self._epoch = shared_zeros(1)
        self._start_batch = shared_zeros(1)
        self._skipped = shared_zeros(max(1, config.num_workers))
        self._batch_size: int | None = None
        self._drop_last = False
        self._num_processes = 1
        self._process_index = 0

    @property
    def epoch(self) -> int:
        """The epoch whose order, crops and flips are given out."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and how many batches of it to pass over."""
        self._epoch.fill_(epoch)
        self._start_batch.fill_(start_batch)

    def set_batches(
        self, batch_size: int, drop_last: bool, num_processes: int = 1, process_index: int = 0
    ) -> None:
        """Give out whole batches, every worker and process its own."""
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._num_processes = num_processes
        self._process_index = process_index

    @property
    def captions(self) -> None:
        """Unknown in advance: a stream is not read ahead."""
        return None

    @property
    def has_captions(self) -> bool:
        """Whether every item has a caption."""
        return self._source.fields.caption is not None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes by their number, or ``None`` when they are unknown."""
        return None if self._source.classes is None else list(self._source.classes.names)

    @property
    def skipped_count(self) -> int:
        """How many images were found unreadable so far, by this process or its workers."""
        return int(self._skipped.sum())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        size = self._batch_size or 1
        numbered = enumerate(self._rows())
        start = int(self._start_batch.item())
        for number, batch in enumerate(self._batches(numbered, size * self._num_processes)):
            if number < start or (number - start) % workers != worker_id:
                continue
            own = batch[self._process_index * size : (self._process_index + 1) * size]
            yield from self._decode(own, worker_id)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        rows = self._source.rows
        if self.shuffle:
            rows = rows.shuffle(seed=self.config.seed, buffer_size=self.config.shuffle_buffer)
            rows.set_epoch(self.epoch)
        # Unlike iter(rows), rows.iter gives every worker the whole stream.
        for number, single in enumerate(rows.iter(batch_size=1)):
            row = {name: values[0] for name, values in single.items()}
            if self._fraction > 0:
                key = self._source.name(row, number)
                held_out = in_holdout(key, self._fraction, self.config.split_seed)
                if held_out != (self._split == "test"):
                    continue
            yield row

    def _batches(self, numbered: Iterator[Row], size: int) -> Iterator[list[Row]]:
        """Global batches; the last one is dropped, or evened out over the processes."""
        first: list[Row] = []
        while batch := list(islice(numbered, size)):
            first = first or batch
            if len(batch) < size:
                if self._drop_last:
                    return
                if self._num_processes > 1:
                    filling = (first * size)[: size - len(batch)]
                    batch = batch + filling
            yield batch

    def _decode(self, batch: list[Row], worker_id: int) -> list[dict[str, Any]]:
        items: list[dict[str, Any] | None] = []
        for index, row in batch:
            try:
                items.append(self._item(index, row))
            except UnreadableImageError as error:
                so_far = str(self.skipped_count + 1)
                report_unreadable(self._source, error, self.config, so_far)
                self._skipped[worker_id] += 1
                items.append(None)
        readable = [item for item in items if item is not None]
        if self._batch_size is None:
            return readable
        if not readable:
            raise DataError(
                f"{self._source.origin}: a whole batch of {len(batch)} images was unreadable, up "
                f"to {self._source.name(batch[-1][1], batch[-1][0])}"
            )
        count = len(items)
        return [
            next(
                item
                for item in (items[(position + step) % count] for step in range(count))
                if item is not None
            )
            for position in range(count)
        ]

    def _item(self, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
        name = self._source.name(row, index)
        array = decode_and_prepare(self._source, row, name, self.config)
        augmentation = (
            Augmentation.draw(self.config, self.epoch, index) if self._augment else Augmentation()
        )
        item = {
            "pixel_values": finish(array, self.config, augmentation),
            "name": name,
            "index": index,
        }
        found = conditions(self._source, row)
        for key, column in (
            ("caption", self._source.fields.caption),
            ("class_label", self._source.fields.label if self._source.classes else None),
        ):
            if column is not None and key not in found:
                raise DataError(f"{self._source.origin}: {name}: nothing in column {column!r}")
        return {**item, **found}
