"""Batches in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from fastldm.data.config import DataConfig
from fastldm.data.images import ImageDataset
from fastldm.data.streaming import StreamingImageDataset
from fastldm.errors import ConfigError, DataError

_ORDER_STREAM = 0
"""Sets the random numbers of the order apart from those of augmentation."""


class EpochSampler(Sampler[int]):
    """All indices once, shuffled by (seed, epoch of the data set)."""

    def __init__(self, dataset: ImageDataset, seed: int, shuffle: bool) -> None:
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(len(self.dataset)))
        entropy = np.random.SeedSequence([_ORDER_STREAM, self.seed, self.dataset.epoch])
        return iter(np.random.default_rng(entropy).permutation(len(self.dataset)).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the order, and of the data set's crops and flips."""
        self.dataset.set_epoch(epoch)


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of one process out of global batches of ``batch_size`` × `num_processes`.

    Process p has the p-th part of every global batch, so that a step sees the same images however
    many processes share it. Without `drop_last` the last global batch may be smaller; over
    several processes it is filled up with the first images of the epoch.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        batch_size: int,
        drop_last: bool,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.start_batch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size * self.num_processes)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        size = self.batch_size * self.num_processes
        for number in range(self.start_batch, len(self)):
            batch = order[number * size : (number + 1) * size]
            if self.num_processes > 1 and len(batch) < size:
                batch += (order * size)[: size - len(batch)]
            own = slice(self.process_index * self.batch_size, None)
            yield batch[own][: self.batch_size]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.sampler.set_epoch(epoch)


class ImageDataLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that knows its epoch.

    Iterating to the end moves on to the next epoch; `set_epoch` chooses one, for example after a
    restart. It draws nothing from torch's global random numbers.
    """

    dataset: ImageDataset | StreamingImageDataset

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives."""
        return self.dataset.epoch

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate over, and how many of its batches to pass over.

        Both hold until an iteration reaches the end or this is called again.
        """
        if epoch < 0 or start_batch < 0:
            raise ConfigError(
                f"epoch and start_batch must not be negative, got {epoch} and {start_batch}"
            )
        if isinstance(self.dataset, StreamingImageDataset):
            self.dataset.set_epoch(epoch, start_batch)
            return
        self.dataset.set_epoch(epoch)
        assert isinstance(self.batch_sampler, EpochBatchSampler)
        self.batch_sampler.start_batch = start_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        epoch = self.epoch
        yield from super().__iter__()
        self.set_epoch(epoch + 1)


def build_dataloader(
    config: DataConfig,
    dataset: ImageDataset | StreamingImageDataset,
    batch_size: int,
    *,
    shuffle: bool = True,
    drop_last: bool | None = None,
    num_processes: int = 1,
    process_index: int = 0,
    pin_memory: bool = False,
) -> ImageDataLoader:
    """Batches of a data set.

    The order is fixed by (``config.seed``, epoch) and does not change with ``config.num_workers``.
    Over several processes either give `num_processes` and `process_index` here, or leave them and
    hand the loader of an `ImageDataset` to ``Accelerator.prepare``; not both.

    Args:
        config: gives the seed and the number of workers.
        dataset: from `load_images`.
        batch_size: images a batch and process.
        shuffle: a new order in every epoch; a stream goes through its shuffle buffer.
        drop_last: leave out the last batch when it is smaller; by default as `shuffle`.
        num_processes: how many processes share a step.
        process_index: which of them this is.
        pin_memory: copy batches to page-locked memory.

    Raises:
        ConfigError: a number is out of range.
        DataError: the data set has fewer images than one step takes.
    """
    if batch_size < 1 or num_processes < 1:
        raise ConfigError(
            f"batch_size and num_processes must be at least 1, got {batch_size} and {num_processes}"
        )
    if not 0 <= process_index < num_processes:
        raise ConfigError(f"process_index must be in 0…{num_processes - 1}, got {process_index}")
    drop_last = shuffle if drop_last is None else drop_last
    common: dict[str, Any] = {
        "num_workers": config.num_workers,
        "collate_fn": collate,
        "pin_memory": pin_memory,
        "persistent_workers": config.num_workers > 0,
        "generator": torch.Generator(),
    }
    if isinstance(dataset, StreamingImageDataset):
        dataset.shuffle = shuffle
        dataset.set_batches(batch_size, drop_last, num_processes, process_index)
        return ImageDataLoader(dataset, batch_size=batch_size, **common)
    if drop_last and len(dataset) < batch_size * num_processes:
        raise DataError(
            f"the data set has {len(dataset)} images, fewer than one step takes: batch_size="
            f"{batch_size} × {num_processes} process{'es' * (num_processes > 1)}"
        )
    sampler = EpochSampler(dataset, config.seed, shuffle)
    batches = EpochBatchSampler(sampler, batch_size, drop_last, num_processes, process_index)
    return ImageDataLoader(dataset, batch_sampler=batches, **common)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors, gather integers into an int64 tensor, keep the rest as lists."""
    batch: dict[str, Any] = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[key] = values
    return batch
