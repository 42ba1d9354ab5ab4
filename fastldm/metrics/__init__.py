"""Figures of merit for reconstructions and samples; each is loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastldm.losses.perceptual import LPIPS
    from fastldm.metrics.codebook import CodebookStatistics, codebook_perplexity, codebook_usage
    from fastldm.metrics.features import NetworkFeatures, RandomConvFeatures
    from fastldm.metrics.fid import FrechetInceptionDistance, frechet_inception_distance
    from fastldm.metrics.frechet import FrechetFeatureDistance, frechet_distance
    from fastldm.metrics.image import psnr, ssim
    from fastldm.metrics.reconstruction import ReconstructionMetrics

_MODULE_OF = {
    "LPIPS": "fastldm.losses.perceptual",
    "CodebookStatistics": "fastldm.metrics.codebook",
    "FrechetFeatureDistance": "fastldm.metrics.frechet",
    "FrechetInceptionDistance": "fastldm.metrics.fid",
    "NetworkFeatures": "fastldm.metrics.features",
    "RandomConvFeatures": "fastldm.metrics.features",
    "ReconstructionMetrics": "fastldm.metrics.reconstruction",
    "codebook_perplexity": "fastldm.metrics.codebook",
    "codebook_usage": "fastldm.metrics.codebook",
    "frechet_distance": "fastldm.metrics.frechet",
    "frechet_inception_distance": "fastldm.metrics.fid",
    "psnr": "fastldm.metrics.image",
    "ssim": "fastldm.metrics.image",
}

__all__ = [
    "LPIPS",
    "CodebookStatistics",
    "FrechetFeatureDistance",
    "FrechetInceptionDistance",
    "NetworkFeatures",
    "RandomConvFeatures",
    "ReconstructionMetrics",
    "codebook_perplexity",
    "codebook_usage",
    "frechet_distance",
    "frechet_inception_distance",
    "psnr",
    "ssim",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
