"""SDXL's single files: two text encoders of transformers beside a UNet and a first stage.

The base model has CLIP's text encoder as ``conditioner.embedders.0`` and OpenCLIP's as
``conditioner.embedders.1``; the refiner has OpenCLIP's alone, as number 0. Stable Diffusion 1 and 2
keep theirs in ``cond_stage_model``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastldm.checkpoints.clip_encoder import (
    is_open_clip,
    load_clip,
    load_projected_clip,
    projected_clip_state_dict,
)
from fastldm.checkpoints.condition_params import infer_condition
from fastldm.checkpoints.reading import Source
from fastldm.checkpoints.single_file import compvis_state_dict
from fastldm.checkpoints.splitting import EMBEDDER_PREFIX, FIRST_STAGE_PREFIX, split_file
from fastldm.errors import CheckpointError, ConfigError


def load_text_encoders(
    source: Source, torch_dtype: torch.dtype | None = None
) -> dict[str, nn.Module]:
    """The CLIP text encoders of a Stable Diffusion file, 1, 2, SDXL or its refiner.

    Args:
        source: the file, or its tensors by name.
        torch_dtype: floating-point dtype of the result; by default float32.

    Returns:
        By the names that diffusers' pipelines have for them, in eval mode: ``text_encoder``, a
        CLIPTextModel, and ``text_encoder_2``, a CLIPTextModelWithProjection. Of Stable Diffusion 2
        the last layer is left out, so that its last hidden state is what the UNet is given.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, or holds no such encoder.
        ConfigError: transformers is not installed.
    """
    file = split_file(source)
    if file.condition:
        kind, fields = infer_condition(file.condition, file.source)
        if kind != "CLIPTextModel":
            raise CheckpointError(f"{file.source}: its cond stage is a {kind}, not CLIP's")
        clip = load_clip(file.condition, fields["layer"], file.source, torch_dtype)
        return {"text_encoder": clip}
    if not file.embedders:
        raise CheckpointError(f"{file.source}: holds no text encoder of Stable Diffusion")
    encoders = {}
    for number, tensors in sorted(file.embedders.items()):
        where = f"{file.source}: {EMBEDDER_PREFIX}{number}"
        projected = is_open_clip(tensors)
        name = "text_encoder_2" if projected else "text_encoder"
        if name in encoders:
            raise CheckpointError(f"{where}: a second {name}")
        encoders[name] = (
            load_projected_clip(tensors, where, torch_dtype)
            if projected
            else load_clip(tensors, "last", where, torch_dtype)
        )
    return encoders


def sdxl_state_dict(
    unet: nn.Module, first_stage: nn.Module, text_encoders: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The tensors of an SDXL file, base or refiner, for `write_single_file`.

    Args:
        unet: `UNet2DConditionModel`.
        first_stage: `AutoencoderKL`.
        text_encoders: as `load_text_encoders` gives them; of the refiner only the second.

    Raises:
        ConfigError: the layout cannot hold a part, or there is another text encoder.
    """
    unknown = sorted(set(text_encoders) - {"text_encoder", "text_encoder_2"})
    if unknown or "text_encoder_2" not in text_encoders:
        raise ConfigError(
            "text_encoders: expected text_encoder_2, and of the base model text_encoder, got "
            f"{', '.join(text_encoders) or 'none'}"
        )
    tensors = compvis_state_dict(unet) | compvis_state_dict(first_stage, FIRST_STAGE_PREFIX)
    parts = []
    if "text_encoder" in text_encoders:
        parts.append(compvis_state_dict(text_encoders["text_encoder"], prefix=""))
    parts.append(projected_clip_state_dict(text_encoders["text_encoder_2"]))
    for number, part in enumerate(parts):
        tensors |= {f"{EMBEDDER_PREFIX}{number}.{name}": value for name, value in part.items()}
    return tensors
