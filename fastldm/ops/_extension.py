"""The compiled extension ``fastldm._C``: loaded at its first use, and never fatal.

An extension that is missing, that lacks a library or that was built for another torch leaves every
operator on the reference backend; `problem` says what is wrong with it.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_OLDEST_CAPABILITY = (8, 0)
_REBUILD = "reinstall with: pip install --no-build-isolation --force-reinstall --no-deps -e ."


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fastldm._C")
    except ModuleNotFoundError:
        return None, (
            "the extension fastldm._C is not installed: there was no C++ compiler when fastldm was "
            f"installed, or the build failed (pip install -v shows why); {_REBUILD}"
        )
    except Exception as error:
        return None, (
            f"the extension fastldm._C cannot be loaded ({type(error).__name__}: {error}); "
            f"it may be for another torch than {torch.__version__}; {_REBUILD}"
        )
    built, running = str(module.torch_version), torch.__version__
    # The C++ interface of torch may change between minor versions, not within one.
    if built.split(".")[:2] != running.split(".")[:2]:
        return None, (
            f"the extension fastldm._C was built for torch {built} and this is torch {running}; "
            f"{_REBUILD}"
        )
    return module, None


def extension() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it cannot be used; the message says why.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


def problem() -> str | None:
    """Why the extension cannot be used here; None where it can."""
    return _load()[1]


def cuda_problem(device: torch.device) -> str | None:
    """Why the extension's CUDA kernels cannot serve a device; None where they can."""
    if device.type != "cuda":
        return None
    if not extension().has_cuda:
        return (
            "the extension fastldm._C was built without CUDA: no CUDA toolkit of torch's major "
            f"version was found when fastldm was installed; {_REBUILD}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return (
            f"its CUDA kernels need sm_80 or newer, {device} is sm_{capability[0]}{capability[1]}"
        )
    return None
