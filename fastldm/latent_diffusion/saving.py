"""`LatentDiffusion` to and from a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fastldm.errors import CheckpointError, ConfigError
from fastldm.latent_diffusion.folder import (
    FIELDS_FILE,
    PipelineFolder,
    read_pipeline,
    write_pipeline,
)
from fastldm.losses.diffusion import DiffusionLossConfig
from fastldm.models.class_embedder import ClassEmbedder
from fastldm.models.text_encoder import TextEncoder
from fastldm.models.weights import check_state_dict

if TYPE_CHECKING:
    from fastldm.latent_diffusion.model import LatentDiffusion

_Model = TypeVar("_Model", bound="LatentDiffusion")

_FIRST_STAGE_NAMES = ("vae", "vqvae")
_CONDITIONER_NAMES = ("text_encoder", "class_embedder", "conditioner")


def save_model(
    model: LatentDiffusion,
    folder: str | Path,
    unet: nn.Module | None,
    conditioner: nn.Module | None,
) -> None:
    """See `LatentDiffusion.save_pretrained`."""
    conditioner = model.conditioner if conditioner is None else conditioner
    components: dict[str, Any] = {
        _first_stage_name(model.first_stage): model.first_stage,
        "unet": model.unet if unet is None else unet,
        "scheduler": model.scheduler,
    }
    if conditioner is not None:
        components[_conditioner_name(conditioner, model.tokenizer)] = conditioner
    if model.tokenizer is not None:
        components["tokenizer"] = model.tokenizer
    scale = model.latent_scale
    fields = {
        "conditioning": model.conditioning,
        "scaling_factor": scale.factor,
        "latent_mean": scale.mean,
        "latent_std": scale.std,
        "conditioning_dropout": model.conditioning_dropout,
        "train_conditioner": model.train_conditioner,
        "use_attention_mask": model.use_attention_mask,
        "max_caption_length": model.max_caption_length,
        "loss": asdict(model.objective.config),
    }
    class_name = _pipeline_class(model, components)
    tensors = model.objective.state_dict()
    write_pipeline(folder, PipelineFolder(class_name, components, fields, tensors))


def load_model(
    kind: type[_Model],
    folder: str | Path,
    torch_dtype: torch.dtype | None,
    parts: Mapping[str, Any],
) -> _Model:
    """See `LatentDiffusion.from_pretrained`."""
    content = read_pipeline(folder, torch_dtype, parts)
    components, fields = content.components, dict(content.fields)
    first_stage = _first(components, _FIRST_STAGE_NAMES)
    for name, part in (
        (" or ".join(_FIRST_STAGE_NAMES), first_stage),
        ("unet", components.get("unet")),
        ("scheduler", components.get("scheduler")),
    ):
        if part is None:
            raise CheckpointError(f"{folder}: its index names no {name}")
    conditioner = _first(components, _CONDITIONER_NAMES)
    fields.setdefault("conditioning", "none" if conditioner is None else "crossattn")
    try:
        model = kind(
            first_stage,
            components["unet"],
            components["scheduler"],
            conditioner,
            tokenizer=components.get("tokenizer"),
            loss=DiffusionLossConfig(**fields.pop("loss", {})),
            **fields,
        )
    except TypeError as error:
        raise ConfigError(f"{Path(folder, FIELDS_FILE)}: {error}") from None
    check_state_dict(content.tensors, model.objective.state_dict(), str(folder))
    model.objective.load_state_dict(content.tensors)
    return model.eval()


def _first_stage_name(first_stage: Any) -> str:
    """The subfolder of a first stage, as diffusers' pipelines name it."""
    return "vqvae" if type(first_stage).__name__ == "VQModel" else "vae"


def _conditioner_name(conditioner: Any, tokenizer: Any | None) -> str:
    if isinstance(conditioner, ClassEmbedder):
        return "class_embedder"
    is_text = tokenizer is not None or isinstance(conditioner, TextEncoder)
    return "text_encoder" if is_text else "conditioner"


def _pipeline_class(model: LatentDiffusion, components: Mapping[str, Any]) -> str:
    """diffusers' pipeline that does with these parts what `LatentDiffusion.sample` does, if any."""
    scale = model.latent_scale
    if scale.mean is None and not scale.shift:
        if model.conditioning == "none" and "vqvae" in components:
            return "LDMPipeline"
        if (
            model.conditioning == "crossattn"
            and "vae" in components
            and type(components.get("text_encoder")).__name__ == "CLIPTextModel"
            and not model.use_attention_mask
            and model.tokenizer is not None
            and model.tokenizer.model_max_length == model.max_caption_length
        ):
            return "StableDiffusionPipeline"
    return "LatentDiffusion"


def _first(components: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((components[name] for name in names if name in components), None)
