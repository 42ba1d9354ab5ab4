"""What the benchmarks measured on a CPU, with all that a figure depends on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu import machine, records
from benchmarks.timing import Quartiles

_PEERS = ("diffusers", "faiss-cpu", "vector-quantize-pytorch")


def write(path: Path, measured: Mapping[str, Mapping[str, Quartiles]]) -> None:
    """Quartiles in microseconds of each contestant of each benchmark, as JSON."""
    content = {
        "stamp": stamp(),
        "benchmarks": {
            test: {
                name: {key: round(seconds * 1e6, 3) for key, seconds in asdict(times).items()}
                for name, times in contestants.items()
            }
            for test, contestants in measured.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stamp() -> dict[str, object]:
    """Processor, threads, versions, commit and date."""
    return {
        "device": processor(),
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
