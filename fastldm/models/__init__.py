"""Models with diffusers' names, configs and state-dict keys; each is loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastldm.models.autoencoder_kl import AutoencoderKL as AutoencoderKL
    from fastldm.models.base import ModelMixin as ModelMixin
    from fastldm.models.class_embedder import ClassEmbedder as ClassEmbedder
    from fastldm.models.identity_first_stage import IdentityFirstStage as IdentityFirstStage
    from fastldm.models.patch_discriminator import PatchDiscriminator as PatchDiscriminator
    from fastldm.models.spatial_rescaler import SpatialRescaler as SpatialRescaler
    from fastldm.models.text_encoder import TextEncoder as TextEncoder
    from fastldm.models.tokenizer import CaptionTokenizer as CaptionTokenizer
    from fastldm.models.unet_2d import UNet2DModel as UNet2DModel
    from fastldm.models.unet_2d_condition import UNet2DConditionModel as UNet2DConditionModel
    from fastldm.models.vq_model import VQModel as VQModel

_MODULE_OF = {
    "AutoencoderKL": "autoencoder_kl",
    "CaptionTokenizer": "tokenizer",
    "ClassEmbedder": "class_embedder",
    "IdentityFirstStage": "identity_first_stage",
    "ModelMixin": "base",
    "PatchDiscriminator": "patch_discriminator",
    "SpatialRescaler": "spatial_rescaler",
    "TextEncoder": "text_encoder",
    "UNet2DConditionModel": "unet_2d_condition",
    "UNet2DModel": "unet_2d",
    "VQModel": "vq_model",
}

__all__ = [
    "AutoencoderKL",
    "CaptionTokenizer",
    "ClassEmbedder",
    "IdentityFirstStage",
    "ModelMixin",
    "PatchDiscriminator",
    "SpatialRescaler",
    "TextEncoder",
    "UNet2DConditionModel",
    "UNet2DModel",
    "VQModel",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
