"""How a GPU is timed, on a device whose clock is a counter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.clock import CpuClock, GpuClock


class Device:
    """Runs what it is given at once, and lets its own time pass."""

    def __init__(self) -> None:
        self.now, self.turns = 0.0, []  # type: tuple[float, list[str]]
        self.recording: list[Callable[[], None]] | None = None
        self.is_cold = False

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.turns.append(name)
            self.now += seconds * (3 if self.is_cold else 1)
            self.is_cold = False

        return lambda: run() if self.recording is None else self.recording.append(run)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.time = 0.0

        def record(self) -> None:
            self.time = found.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return (end.time - self.time) * 1e3

    class Graph:
        def capture_begin(self) -> None:
            found.recording = []

        def capture_end(self) -> None:
            self.runs, found.recording = found.recording, None

        def replay(self) -> None:
            for run in self.runs or ():
                run()

    class Flush:
        def zero_(self) -> None:
            found.turns.append("flush")
            found.is_cold = True
            found.now += 1.0

    properties = SimpleNamespace(L2_cache_size=50)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "empty", lambda size, **_: Flush() if size == 100 else None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    for name, value in {
        "Event": Event, "CUDAGraph": Graph, "Stream": object, "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_cold_and_warm_medians(device: Device) -> None:
    calls = {"a": device.call("a", 2e-5), "b": device.call("b", 1e-3)}
    times = GpuClock().times(calls, rounds=4)
    assert times["a"].cold == pytest.approx(6e-5)
    assert times["a"].warm == pytest.approx(2e-5)
    assert times["b"].cold == pytest.approx(3e-3)
    assert times["b"].warm == pytest.approx(1e-3)
    assert times["a"].how == "graph"
    # A round not counted and four that are; the cache is cold in each turn of the first half.
    cold = ["flush", "a", "flush", "b"] * 5
    start = device.turns.index("flush")
    assert device.turns[start : start + len(cold)] == cold
    assert "flush" not in device.turns[start + len(cold) :]


def test_what_cannot_be_captured_is_called(device: Device) -> None:
    captured = device.call("a", 1e-4)

    def reads_back() -> None:
        if device.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured()

    times = GpuClock().times({"a": reads_back}, rounds=3)["a"]
    assert times.how == "calls"
    assert times.cold == pytest.approx(3e-4)
    assert times.warm == pytest.approx(1e-4)


def test_a_dry_run_has_times_for_all() -> None:
    times = CpuClock().times({"a": lambda: None, "b": lambda: sum(range(1000))})
    assert set(times) == {"a", "b"}
    assert all(found.cold > 0 and found.how == "calls" for found in times.values())
