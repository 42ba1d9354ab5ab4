"""Training of both stages on Hugging Face Accelerate; each part is loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastldm.training.autoencoder import train_autoencoder
    from fastldm.training.config import (
        AutoencoderTrainingConfig,
        LatentDiffusionTrainingConfig,
        ModelConfig,
    )
    from fastldm.training.ema import ExponentialMovingAverage
    from fastldm.training.latent_cache import LatentCache, encode_dataset
    from fastldm.training.latent_diffusion import train_latent_diffusion

_MODULE_OF = {
    "AutoencoderTrainingConfig": "config",
    "ExponentialMovingAverage": "ema",
    "LatentCache": "latent_cache",
    "LatentDiffusionTrainingConfig": "config",
    "ModelConfig": "config",
    "encode_dataset": "latent_cache",
    "train_autoencoder": "autoencoder",
    "train_latent_diffusion": "latent_diffusion",
}

__all__ = [
    "AutoencoderTrainingConfig",
    "ExponentialMovingAverage",
    "LatentCache",
    "LatentDiffusionTrainingConfig",
    "ModelConfig",
    "encode_dataset",
    "train_autoencoder",
    "train_latent_diffusion",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
