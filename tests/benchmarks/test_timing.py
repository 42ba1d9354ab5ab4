"""Turns and their statistics, by a clock that a test sets."""

from __future__ import annotations

import pytest
import torch

from benchmarks.timing import CudaTimer, Quartiles, Times, interleaved, timer_of


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_contestants_take_turns_and_begin_in_turn() -> None:
    clock, called = _Clock(), []

    def takes(name: str, seconds: float):
        def call() -> None:
            called.append(name)
            clock.now += seconds

        return call

    found = interleaved({"slow": takes("slow", 0.5), "fast": takes("fast", 1e-3)}, 3, clock)
    # One call warms up and one is timed; the fast one's turn is of two calls.
    rounds = [*"sff", *"ffs", *"sff"]
    assert [name[0] for name in called] == [*"ss", *"fffff", *rounds]
    assert found["slow"].calls == 1
    assert found["slow"].turns == pytest.approx([0.5] * 3)
    assert found["fast"].calls == 2
    assert found["fast"].turns == pytest.approx([1e-3] * 3)


def test_quartiles() -> None:
    assert Times(1, [5.0, 1.0, 2.0, 4.0, 3.0]).quartiles == Quartiles(2.0, 3.0, 4.0)
    assert Times(1, [7.0]).quartiles == Quartiles(7.0, 7.0, 7.0)


def test_the_clock_of_a_gpu_adds_up_what_lies_between_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        milliseconds = iter([100.0, 103.0, 110.0])

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = next(self.milliseconds)

        def synchronize(self) -> None:
            assert self.time

        def elapsed_time(self, other: Event) -> float:
            return other.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = timer_of("cuda")
    assert isinstance(timer, CudaTimer)
    assert [timer(), timer(), timer()] == pytest.approx([0.0, 3e-3, 10e-3])
