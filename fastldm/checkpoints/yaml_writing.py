"""CompVis's YAML file of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from fastldm.checkpoints.clip_encoder import is_open_clip
from fastldm.checkpoints.describing import first_stage_arguments, unet_arguments
from fastldm.checkpoints.ldm_params import FIRST_STAGE, UNCONDITIONAL
from fastldm.checkpoints.schedule import schedule_arguments
from fastldm.checkpoints.whole_model import FileLayout
from fastldm.errors import ConfigError
from fastldm.models.class_embedder import ClassEmbedder
from fastldm.models.spatial_rescaler import SpatialRescaler
from fastldm.models.text_encoder import TextEncoder
from fastldm.models.vq_model import VQModel
from fastldm.storage import atomic_file

_ENCODERS = "ldm.modules.encoders.modules"
_BERT = {"num_heads": 8, "head_dim": 64, "use_attention_mask": False, "dropout": 0.0}
"""What CompVis's BERTEmbedder always is."""


def write_yaml(config: Mapping[str, Any], path: str | Path) -> None:
    """Write a YAML file, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")


def whole_yaml(
    unet: Any,
    first_stage: Any,
    conditioner: nn.Module | None,
    scheduler: Mapping[str, Any],
    conditioning: str,
    arguments: Mapping[str, Any],
    layout: FileLayout,
) -> dict[str, Any]:
    """The YAML file of a model, with which CompVis's code reads its file.

    Args:
        unet, first_stage, conditioner: the models.
        scheduler: config of the noise schedule.
        conditioning: of `LatentDiffusion`.
        arguments: of CompVis's LatentDiffusion that are no part of these: scale, loss, averages.
        layout: of the file.

    Raises:
        ConfigError: CompVis's classes cannot be such a model.
    """
    is_class = conditioning == "class"
    key = "adm" if is_class and conditioner is None else "crossattn" if is_class else conditioning
    is_vq = isinstance(first_stage, VQModel)
    stage = first_stage_arguments(first_stage)
    if not is_vq and not first_stage.config["use_quant_conv"]:
        raise ConfigError("use_quant_conv: CompVis's AutoencoderKL always has them, got False")
    params: dict[str, Any] = {
        **schedule_arguments(scheduler),
        **arguments,
        "channels": first_stage.latent_channels,
        "conditioning_key": None if key == "none" else key,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": unet_arguments(unet, layout.new_attention_order),
        },
        "first_stage_config": {
            "target": f"ldm.models.autoencoder.{'VQModelInterface' if is_vq else 'AutoencoderKL'}",
            "params": {**stage, "lossconfig": {"target": "torch.nn.Identity"}},
        },
        "cond_stage_config": _condition(conditioner, conditioning, layout),
    }
    size = unet.config["sample_size"]
    if size is not None:
        params["image_size"] = size
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _condition(conditioner: nn.Module | None, conditioning: str, layout: FileLayout) -> Any:
    if conditioning == "none":
        return UNCONDITIONAL
    if layout.shares_first_stage:
        return FIRST_STAGE
    target, params = _condition_arguments(conditioner, layout)
    return {"target": target, "params": params} if params else {"target": target}


def _condition_arguments(
    conditioner: nn.Module | None, layout: FileLayout
) -> tuple[str, dict[str, Any]]:
    if conditioner is None:
        return "torch.nn.Identity", {}
    if isinstance(conditioner, ClassEmbedder):
        width = conditioner.config["hidden_size"]
        return f"{_ENCODERS}.ClassEmbedder", {
            "embed_dim": width,
            "n_classes": conditioner.num_rows,
            "key": "class_label",
        }
    if isinstance(conditioner, SpatialRescaler):
        fields = dict(conditioner.config)
        return f"{_ENCODERS}.SpatialRescaler", {"n_stages": fields.pop("num_stages"), **fields}
    if isinstance(conditioner, TextEncoder):
        return f"{_ENCODERS}.BERTEmbedder", _bert_arguments(conditioner)
    if type(conditioner).__name__ == "CLIPTextModel":
        if is_open_clip(layout.condition):
            return f"{_ENCODERS}.FrozenOpenCLIPEmbedder", {"freeze": True, "layer": "penultimate"}
        return f"{_ENCODERS}.FrozenCLIPEmbedder", {}
    raise ConfigError(f"conditioner: CompVis has no {type(conditioner).__name__}")


def _bert_arguments(encoder: TextEncoder) -> dict[str, Any]:
    config = encoder.config
    wide = config["intermediate_size"] in (None, 4 * config["hidden_size"])
    differing = [name for name, value in _BERT.items() if config[name] != value]
    if differing or not wide:
        raise ConfigError(
            f"{', '.join(differing) or 'intermediate_size'}: CompVis's BERTEmbedder has "
            f"{_BERT} and an inner width of 4·n_embed"
        )
    return {
        "n_embed": config["hidden_size"],
        "n_layer": config["num_layers"],
        "vocab_size": config["vocab_size"],
        "max_seq_len": config["max_length"],
    }
