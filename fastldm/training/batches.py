"""An endless stream of batches whose position can be stored and taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from fastldm.errors import DataError


class EpochLoader(Protocol):
    """A loader that gives one epoch an iteration, in an order fixed by the epoch's number."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the next epoch and how many of its batches to pass over."""
        ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class BatchStream:
    """Batches of one epoch after the other, from any position on.

    Attributes:
        epoch: number of the epoch that the next batch belongs to, unless it ends here.
        batch: how many batches of that epoch were given out.
    """

    def __init__(self, loader: EpochLoader, epoch: int = 0, batch: int = 0) -> None:
        self.loader = loader
        self.epoch = epoch
        self.batch = batch
        self._batches = self._run()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    @property
    def skipped_count(self) -> int:
        """How many images of the loader's data set were found unreadable so far."""
        return getattr(getattr(self.loader, "dataset", None), "skipped_count", 0)

    def restart(self, epoch: int, batch: int) -> None:
        """Go on from a stored position."""
        self.epoch = epoch
        self.batch = batch
        self._batches = self._run()

    def _run(self) -> Iterator[dict[str, Any]]:
        while True:
            self.loader.set_epoch(self.epoch, self.batch)
            first = self.batch
            for batch in self.loader:
                self.batch += 1
                yield batch
            if self.batch == first == 0:
                raise DataError("the data set gave no batch in a whole epoch")
            self.epoch += 1
            self.batch = 0
