"""Where a result was found: device, versions, commit."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata

import torch

from benchmarks.gpu import records
from benchmarks.gpu.records import Stamp


def stamp(device: str) -> Stamp:
    """What goes with every result but the date."""
    is_gpu = device == "cuda"
    properties = torch.cuda.get_device_properties(0) if is_gpu else None
    return {
        "on": device,
        "device": properties.name if properties else "CPU (dry run)",
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "driver": driver() if is_gpu else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "commit": records.commit(),
        "sources": records.sources_digest(),
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Of the NVIDIA driver, as nvidia-smi gives it."""
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def output_of(program: str, *arguments: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    found = shutil.which(program)
    if found is None:
        return None
    result = subprocess.run([found, *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
