"""What is on the machine: devices, versions, backends, and the peers that are missing."""

from __future__ import annotations

import os
from collections.abc import Iterator

from benchmarks.gpu.machine import output_of, version
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import env

PEERS = ("pytest", "ninja", "pybind11", "setuptools", "triton", "diffusers", "faiss-cpu")
"""Packages that a stage uses where they are installed."""


def run(context: Context) -> Iterator[Row]:
    yield {"what": "fastldm.env", **env.collect()}
    yield {
        "what": "tools",
        "nvidia-smi": output_of("nvidia-smi"),
        "nvcc": output_of("nvcc", "--version"),
        "compute-sanitizer": output_of("compute-sanitizer", "--version"),
        "processors": os.cpu_count(),
    }
    for package in PEERS:
        found = version(package)
        row: Row = {"what": f"package {package}", "version": found}
        yield row if found else {**row, "skipped": f"{package} is not installed"}
