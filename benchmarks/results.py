"""What the benchmarks measured, with all that a figure depends on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu import machine, records
from benchmarks.racing import Measured

_PEERS = ("diffusers", "faiss-cpu", "vector-quantize-pytorch")


def write(path: Path, measured: Mapping[str, Measured], device: str = "cpu") -> None:
    """As JSON: of each contestant of each benchmark quartiles in microseconds and peak memory.

    Where there were several runs, the ratios to the first contestant in each are there, too; and
    what share of the processors other programs had meanwhile.
    """
    content = {
        "stamp": stamp(device),
        "benchmarks": {
            test: {
                name: {
                    **{
                        key: round(seconds * 1e6, 3)
                        for key, seconds in asdict(times.quartiles).items()
                    },
                    "peak_bytes": found.peak_bytes[name],
                }
                for name, times in found.times.items()
            }
            for test, found in measured.items()
        },
        "ratios": {
            test: {
                name: [round(ratio, 4) for ratio in ratios] for name, ratios in found.ratios.items()
            }
            for test, found in measured.items()
            if any(len(ratios) > 1 for ratios in found.ratios.values())
        },
        "disturbance": {
            test: round(found.disturbance, 3)
            for test, found in measured.items()
            if found.disturbance is not None
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stamp(device: str = "cpu") -> dict[str, object]:
    """Device, threads, versions, commit and date."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: machine.version(package) for package in _PEERS},
        "commit": records.commit(),
        "sources": records.sources_digest(),
        "date": records.now(),
    }


def processor() -> str:
    """The model's name as Linux gives it, or the architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()
