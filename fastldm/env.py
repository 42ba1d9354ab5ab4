"""What fastldm finds here: ``python -m fastldm.env`` prints it, to be pasted into a report.

Versions, devices, the state of the compiled extension, and for each operator and device the
backend that serves it and why another one does not.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fastldm import ops
from fastldm._version import __version__
from fastldm.ops import _dispatch, _extension

_PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "huggingface_hub", "accelerate", "datasets",
    "diffusers", "jsonargparse", "lpips", "tokenizers", "torch-fidelity", "torchvision",
    "transformers",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Everything that ``python -m fastldm.env`` prints.

    Returns:
        ``fastldm``, ``python`` and ``platform``: strings. ``packages``: name → version, or None
        where it is not installed. ``cuda``: of torch's build, or None. ``threads``: of torch on
        the CPU. ``devices``: name → description. ``extension``: ``usable``, ``problem`` (None
        where there is none), ``torch_version`` and ``compiler`` it was built with, ``has_cuda``.
        ``operators``: operator → device → ``served_by`` and ``reasons`` (backend → why not).
    """
    devices = dict(_devices())
    return {
        "fastldm": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": devices,
        "extension": _extension_state(),
        "operators": {
            name: {device: _service(name, device) for device in devices} for name in ops.OPERATORS
        },
    }


def report() -> str:
    """`collect` as text."""
    found = collect()
    lines = [f"{name}: {found[name]}" for name in ("fastldm", "python", "platform")]
    lines += [
        f"{name}: {version or 'not installed'}" for name, version in found["packages"].items()
    ]
    lines.append(f"CUDA of torch: {found['cuda'] or 'none'}")
    lines.append(f"CPU threads: {found['threads']}")
    lines += [f"device {name}: {text}" for name, text in found["devices"].items()]
    extension = found["extension"]
    if extension["usable"]:
        cuda = "with CUDA" if extension["has_cuda"] else "without CUDA"
        lines.append(
            f"extension: built for torch {extension['torch_version']} by {extension['compiler']}, "
            f"{cuda}"
        )
    else:
        lines.append(f"extension: not used: {extension['problem']}")
    lines.append("operators:")
    for name, by_device in found["operators"].items():
        for device, service in by_device.items():
            lines.append(f"  {name} on {device}: {service['served_by']}")
            for other, why in service["reasons"].items():
                known = why == extension["problem"]
                lines.append(f"    not {other}: {'no extension, see above' if known else why}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    yield (
        "cpu",
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )


def _extension_state() -> dict[str, Any]:
    problem = _extension.problem()
    module = None if problem else _extension.extension()
    names = ("torch_version", "compiler", "has_cuda")
    return {
        "usable": module is not None,
        "problem": problem,
        **{name: getattr(module, name, None) for name in names},
    }


def _service(op_name: str, device: str) -> dict[str, Any]:
    arguments = _example(op_name, device)
    reasons = {name: _dispatch.why_not(op_name, name, *arguments) for name in ops.BACKENDS}
    return {
        "served_by": next(name for name, reason in reasons.items() if reason is None),
        "reasons": {name: reason for name, reason in reasons.items() if reason is not None},
    }


def _example(op_name: str, device: str) -> tuple[Tensor | int, ...]:
    """Arguments of an ordinary call in float32."""
    x = torch.zeros(1, 4, 2, 2, device=device)
    if op_name == "group_norm_silu":
        return x, 2
    if op_name == "geglu":
        return (x,)
    if op_name == "cross_attention":
        return x, x, x
    if op_name == "vector_quantize":
        return x, torch.zeros(3, 4, device=device)
    if op_name == "codebook_statistics":
        return x, torch.zeros(1, 2, 2, device=device, dtype=torch.int64), 3
    width = 5 if op_name == "ddim_step" else 7
    return x, x, torch.zeros(width, device=device)


def main() -> int:
    """Print `report`."""
    print(report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
