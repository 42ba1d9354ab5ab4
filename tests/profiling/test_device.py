"""Devices that are there and are not, and what is said of them."""

from __future__ import annotations

import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.profiling.device import (
    available_memory,
    choose_device,
    measure_roofs,
    median_seconds,
    stamp,
)

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device: got 'cuda', but torch finds no GPU here"):
        choose_device("cuda")
    assert choose_device(None) == CPU


@pytest.mark.parametrize("name", ["warp", "meta"])
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device: got '{name}'; accepted: cpu, cuda"):
        choose_device(name)


def test_what_the_machine_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.profiling import device

    monkeypatch.setattr(device, "_COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(device, "_SIDES", {"cpu": (64, 128)})
    roofs = measure_roofs(CPU, torch.float32)
    assert roofs.flops_per_second > 1e6
    assert roofs.bytes_per_second > 1e6
    assert 2**20 < available_memory(CPU) < 2**62
    assert {"device", "threads", "dtype", "torch", "date"} <= stamp(CPU, torch.float32).keys()


def test_calls_are_repeated_within_the_budget() -> None:
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), CPU, budget=0) >= 0
    assert len(calls) == 1
    median_seconds(lambda: calls.append(1), CPU, budget=10)
    assert len(calls) == 1 + 15
