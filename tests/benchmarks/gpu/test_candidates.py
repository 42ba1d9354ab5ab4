"""A candidate is compared with the best so far in the same turns, and only if it is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.candidates import Checked, ratios
from benchmarks.gpu.clock import CpuClock, Times

_active: list[str] = []


@contextlib.contextmanager
def _tiling(name: str) -> Iterator[None]:
    _active.append(name)
    yield
    _active.pop()


class _Clock(CpuClock):
    """By which a candidate takes a quarter of the time at the first call, and as long at others."""

    def __init__(self) -> None:
        self.turns = 0

    def times(self, calls: Any, rounds: int = 1) -> dict[str, Times]:
        for call in calls.values():
            call()
        self.turns += 1
        seconds = {"candidate": 0.25 if self.turns % 2 else 1.0, "best": 1.0}
        return {name: Times(value, value, "calls") for name, value in seconds.items()}


def _call(seen: list[str]) -> Sequence[Tensor]:
    seen.append(_active[-1])
    return (torch.ones(2),)


def test_geometric_mean_over_the_calls_twice() -> None:
    seen: list[str] = []
    call = Checked(partial(_call, seen), lambda *_: None)
    found = ratios(partial(_tiling, "new"), partial(_tiling, "old"), [call, call], _Clock())
    assert found == [0.5, 0.5]
    # It is checked before it is timed.
    assert seen[:3] == ["new", "new", "old"]


def test_a_wrong_result_is_a_reason() -> None:
    def check(name: str, found: Sequence[Tensor]) -> None:
        assert _active == []
        raise AssertionError("result 0: error 1, allowed 0.1")

    call = Checked(partial(_call, []), check)
    found = ratios(partial(_tiling, "new"), partial(_tiling, "old"), [call], _Clock())
    assert found == "AssertionError: result 0: error 1, allowed 0.1"


@pytest.mark.parametrize("error", [RuntimeError("out of resource: shared memory"), ValueError("x")])
def test_what_cannot_be_launched_is_a_reason(error: Exception) -> None:
    def fails() -> Sequence[Tensor]:
        raise error

    found = ratios(
        partial(_tiling, "new"), partial(_tiling, "old"), [Checked(fails, lambda *_: None)],
        _Clock(),
    )  # fmt: skip
    assert found == f"{type(error).__name__}: {error}"
