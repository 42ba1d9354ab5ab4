"""Losses of both stages; each is loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastldm.losses.diffusion import DiffusionLoss, DiffusionLossConfig
    from fastldm.losses.first_stage import FirstStageLoss
    from fastldm.losses.first_stage_config import FirstStageLossConfig
    from fastldm.losses.perceptual import LPIPS

_MODULE_OF = {
    "LPIPS": "perceptual",
    "DiffusionLoss": "diffusion",
    "DiffusionLossConfig": "diffusion",
    "FirstStageLoss": "first_stage",
    "FirstStageLossConfig": "first_stage_config",
}

__all__ = [
    "LPIPS",
    "DiffusionLoss",
    "DiffusionLossConfig",
    "FirstStageLoss",
    "FirstStageLossConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
