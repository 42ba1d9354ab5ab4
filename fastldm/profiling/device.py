"""The device that is measured on: its name, its memory, and what it can do at most."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastldm._version import __version__
from fastldm.errors import ConfigError

_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
_SIDES = {"cpu": (1024, 1536), "cuda": (8192,)}
_ROUNDS = 5


@dataclass(frozen=True)
class Roofs:
    """Measured limits: FLOPs a second of a matrix product, bytes a second of a copy."""

    flops_per_second: float
    bytes_per_second: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; by default a GPU where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: got {name!r}; accepted: cpu, cuda, cuda:1, …") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {name!r}; accepted: cpu, cuda, cuda:1, …")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} GPUs" if count else "no GPU"
        raise ConfigError(f"device: got {name!r}, but torch finds {found} here")
    return device


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """The median of as many calls as `budget` seconds allow, at least one and at most 15."""
    times: list[float] = []
    while not times or (sum(times) + times[-1] < budget and len(times) < 15):
        times.append(seconds_of(call, device))
    return statistics.median(times)


def measure_roofs(device: torch.device, dtype: torch.dtype) -> Roofs:
    """What a large matrix product and a large copy reach here, each the best of several."""
    kind = device.type
    rates = []
    for side in _SIDES[kind]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = min(seconds_of(lambda a=a, b=b: a @ b, device) for _ in range(_ROUNDS))  # type: ignore[misc]
        rates.append(2 * side**3 / best)
    source = torch.ones(_COPIED_BYTES[kind] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(_ROUNDS))
    return Roofs(max(rates), _COPIED_BYTES[kind] / best)


def available_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    information = Path("/proc/meminfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63 - 1


def stamp(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All that a measured figure depends on beside the models."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "fastldm": __version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The GPU's or processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return f"{value.strip()} (CPU)"
    return f"{platform.machine()} (CPU)"
