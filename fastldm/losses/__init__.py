"""Losses of both stages; each is loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastldm.losses.diffusion import DiffusionLoss, DiffusionLossConfig
    from fastldm.losses.first_stage import FirstStageLoss
    from fastldm.losses.first_stage_config import FirstStageLossConfig
    from fastldm.losses.gaussian_diffusion import GaussianDiffusion
    from fastldm.losses.perceptual import LPIPS
    from fastldm.losses.variational_bound import BoundTerms, VariationalBound

_MODULE_OF = {
    "BoundTerms": "variational_bound",
    "LPIPS": "perceptual",
    "DiffusionLoss": "diffusion",
    "DiffusionLossConfig": "diffusion",
    "FirstStageLoss": "first_stage",
    "FirstStageLossConfig": "first_stage_config",
    "GaussianDiffusion": "gaussian_diffusion",
    "VariationalBound": "variational_bound",
}

__all__ = [
    "LPIPS",
    "BoundTerms",
    "DiffusionLoss",
    "DiffusionLossConfig",
    "FirstStageLoss",
    "FirstStageLossConfig",
    "GaussianDiffusion",
    "VariationalBound",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
