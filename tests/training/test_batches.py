"""The endless stream of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastldm.errors import DataError
from fastldm.training.batches import BatchStream


class Loader:
    """Three batches an epoch, named after it."""

    def __init__(self, batches: int = 3) -> None:
        self.batches = batches
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.start, self.batches):
            yield {"name": (self.epoch, number)}


def take(stream: BatchStream, count: int) -> list[tuple[int, int]]:
    return [next(stream)["name"] for _ in range(count)]


def test_epochs_follow_each_other() -> None:
    assert take(BatchStream(Loader()), 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize("consumed", range(8))
def test_any_position_can_be_taken_up(consumed: int) -> None:
    stream = BatchStream(Loader())
    expected = take(BatchStream(Loader()), 12)[consumed:]
    take(stream, consumed)
    other = BatchStream(Loader())
    take(other, 2)
    other.restart(stream.epoch, stream.batch)
    assert take(other, 12 - consumed) == expected


def test_a_loader_without_batches_is_an_error() -> None:
    with pytest.raises(DataError, match="no batch"):
        next(BatchStream(Loader(0)))
