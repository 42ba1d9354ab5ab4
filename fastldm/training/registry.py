"""The classes that a configuration may name, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastldm.errors import CheckpointError, ConfigError
from fastldm.models.weights import why_no_model
from fastldm.storage import read_json
from fastldm.training.config import ModelConfig
from fastldm.training.field_types import check_types

FIRST_STAGES = ("AutoencoderKL", "VQModel")
PIXEL_STAGE = "IdentityFirstStage"
DISCRIMINATORS = ("PatchDiscriminator",)
UNETS = ("UNet2DModel", "UNet2DConditionModel")
CONDITIONERS = ("TextEncoder", "ClassEmbedder")
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
)

_HOME = {
    **dict.fromkeys(
        (*FIRST_STAGES, PIXEL_STAGE, *DISCRIMINATORS, *UNETS, *CONDITIONERS), "fastldm.models"
    ),
    **dict.fromkeys(SCHEDULERS, "fastldm.schedulers"),
}


def resolve_class(name: str, accepted: Collection[str], field: str) -> type:
    """The class of a name.

    Raises:
        ConfigError: the name is not one of `accepted`.
    """
    if name not in accepted:
        raise ConfigError(
            f"{field}.class_name: expected one of {', '.join(accepted)}, got {name!r}"
        )
    return getattr(importlib.import_module(_HOME[name]), name)


def build(model: ModelConfig, accepted: Collection[str], field: str) -> Any:
    """A new object of a configuration, or one loaded from its ``pretrained`` folder.

    Args:
        model: what to build.
        accepted: class names for this place.
        field: the place, named in errors.

    Raises:
        ConfigError: the class is not accepted, or its configuration is refused.
        CheckpointError: ``pretrained`` cannot be loaded.
    """
    kind: Any = resolve_class(model.class_name, accepted, field)
    check_types(kind, model.config, f"{field}.config")
    try:
        if model.pretrained is not None:
            return kind.from_pretrained(model.pretrained, **model.config)
        return kind.from_config(model.config)
    except ConfigError as error:
        raise ConfigError(f"{field}.config: {error}") from None
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{field}.config: a value has the wrong type ({error})") from None


def load_first_stage(folder: str | Path, field: str = "first_stage") -> Any:
    """The autoencoder of a folder, of the class that its config names.

    Args:
        folder: of the autoencoder alone, or of a latent diffusion model that has it in ``vae`` or
            ``vqvae``.
        field: the option that named it, for errors.

    Raises:
        CheckpointError: the folder or its weights are missing or damaged.
        ConfigError: the config names no first stage.
    """
    inside = [name for name in ("vae", "vqvae") if Path(folder, name, "config.json").is_file()]
    subfolder = inside[0] if inside and Path(folder, "model_index.json").is_file() else None
    path = Path(folder, subfolder or "", "config.json")
    if not path.is_file():
        raise CheckpointError(f"{field}: {why_no_model(folder, 'config.json')}")
    config = read_json(path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    accepted = (*FIRST_STAGES, PIXEL_STAGE)
    if name not in accepted:
        raise ConfigError(f"{path}: expected _class_name {' or '.join(accepted)}, got {name!r}")
    kind: Any = resolve_class(name, accepted, field)
    return kind.from_pretrained(folder, subfolder=subfolder)
