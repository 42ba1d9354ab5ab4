"""fastldm: latent diffusion models on fused kernels (arXiv 2112.10752).

Public names load on first use, so importing the package starts no CUDA context and loads neither
Triton nor the compiled extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastldm._version import __version__

if TYPE_CHECKING:
    from fastldm.latent_diffusion import LatentDiffusion
    from fastldm.losses import FirstStageLoss, FirstStageLossConfig
    from fastldm.models import (
        AutoencoderKL,
        CaptionTokenizer,
        ClassEmbedder,
        ModelMixin,
        PatchDiscriminator,
        SpatialRescaler,
        TextEncoder,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )
    from fastldm.schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        SchedulerMixin,
        UniPCMultistepScheduler,
    )

_HOME_OF_NAME = {
    "AutoencoderKL": "fastldm.models",
    "CaptionTokenizer": "fastldm.models",
    "ClassEmbedder": "fastldm.models",
    "DDIMScheduler": "fastldm.schedulers",
    "DDPMScheduler": "fastldm.schedulers",
    "DPMSolverMultistepScheduler": "fastldm.schedulers",
    "DPMSolverSinglestepScheduler": "fastldm.schedulers",
    "EulerAncestralDiscreteScheduler": "fastldm.schedulers",
    "EulerDiscreteScheduler": "fastldm.schedulers",
    "FirstStageLoss": "fastldm.losses",
    "FirstStageLossConfig": "fastldm.losses",
    "HeunDiscreteScheduler": "fastldm.schedulers",
    "LCMScheduler": "fastldm.schedulers",
    "LMSDiscreteScheduler": "fastldm.schedulers",
    "LatentDiffusion": "fastldm.latent_diffusion",
    "ModelMixin": "fastldm.models",
    "PNDMScheduler": "fastldm.schedulers",
    "PatchDiscriminator": "fastldm.models",
    "SchedulerMixin": "fastldm.schedulers",
    "SpatialRescaler": "fastldm.models",
    "TextEncoder": "fastldm.models",
    "UNet2DConditionModel": "fastldm.models",
    "UNet2DModel": "fastldm.models",
    "UniPCMultistepScheduler": "fastldm.schedulers",
    "VQModel": "fastldm.models",
}
_SUBPACKAGES = ("data", "losses", "metrics", "models", "modules", "ops", "schedulers", "training")

__all__ = [
    "AutoencoderKL",
    "CaptionTokenizer",
    "ClassEmbedder",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FirstStageLoss",
    "FirstStageLossConfig",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "LatentDiffusion",
    "ModelMixin",
    "PNDMScheduler",
    "PatchDiscriminator",
    "SchedulerMixin",
    "SpatialRescaler",
    "TextEncoder",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UniPCMultistepScheduler",
    "VQModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF_NAME:
        return getattr(importlib.import_module(_HOME_OF_NAME[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastldm.{name}")
    raise AttributeError(f"module 'fastldm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
