"""The CLIP text encoder of a Stable Diffusion file, as transformers' CLIPTextModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.checkpoints.conditioner_keys import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    conditioner_places,
)
from fastldm.checkpoints.keymap import make_rows, to_fastldm
from fastldm.errors import CheckpointError, ConfigError

_HEAD_WIDTH = 64
_LAYER = re.compile(r"model\.transformer\.resblocks\.(\d+)\.ln_1\.weight")
_NOT_USED = ("model.text_projection", "model.logit_scale")
"""Of OpenCLIP: they make one vector of a text, which the UNet does not see."""
_POSITION_IDS = f"{CLIP_PREFIX}embeddings.position_ids"
_CLIP_LAYER = re.compile(re.escape(CLIP_PREFIX) + r"encoder\.layers\.(\d+)\.layer_norm1\.weight")


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the weights are in OpenCLIP's layout, as in Stable Diffusion 2."""
    return any(name.startswith(OPEN_CLIP_PREFIX) for name in tensors)


def load_clip(
    tensors: Mapping[str, Tensor], layer: str, source: str, torch_dtype: torch.dtype | None
) -> nn.Module:
    """A CLIPTextModel whose last hidden state is what the UNet is given.

    Args:
        tensors: of the cond stage, named without its prefix.
        layer: "last", or "penultimate" (OpenCLIP): the last layer is then left out.
        source: for messages.
        torch_dtype: of the result.

    Raises:
        CheckpointError: the weights are not those of a CLIP text encoder.
        ConfigError: `layer` is another, or transformers is not installed.
    """
    open_clip = is_open_clip(tensors)
    if layer not in ("last", "penultimate") or (layer == "penultimate" and not open_clip):
        raise ConfigError(f"layer: fastldm takes CLIP's last hidden state, got {layer!r:.60}")
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        raise ConfigError(
            f"{source}: its text encoder is CLIP's, which needs transformers; or give conditioner="
        ) from None
    if open_clip:
        fields, tensors = _open_clip_fields(tensors, layer, source)
    else:
        fields, tensors = _clip_fields(tensors, source)
    try:
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**fields))
    except Exception as error:  # sizes that transformers refuses, in several ways
        raise CheckpointError(f"{source}: no CLIP text encoder has {fields}: {error}") from None
    rows = make_rows(conditioner_places(model, open_clip), model.state_dict())
    state = to_fastldm(rows, tensors, model.state_dict(), source, torch_dtype)
    model.load_state_dict(state, assign=True)
    # The one buffer that no file holds.
    positions = torch.arange(fields["max_position_embeddings"]).expand(1, -1)
    for module in model.modules():
        if "position_ids" in module._buffers:
            module._buffers["position_ids"] = positions.clone()
    return model.eval()


def _clip_fields(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = {int(found[1]) for found in map(_CLIP_LAYER.fullmatch, tensors) if found}
    embeddings = f"{CLIP_PREFIX}embeddings"
    fields = _fields(
        tensors,
        f"{embeddings}.token_embedding.weight",
        f"{embeddings}.position_embedding.weight",
        f"{CLIP_PREFIX}encoder.layers.0.mlp.fc1.weight",
        source,
    )
    kept = {name: tensor for name, tensor in tensors.items() if name != _POSITION_IDS}
    return {**fields, "num_hidden_layers": len(layers), "hidden_act": "quick_gelu"}, kept


def _open_clip_fields(
    tensors: Mapping[str, Tensor], layer: str, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    count = len({int(found[1]) for found in map(_LAYER.fullmatch, tensors) if found})
    fields = _fields(
        tensors,
        "model.token_embedding.weight",
        "model.positional_embedding",
        "model.transformer.resblocks.0.mlp.c_fc.weight",
        source,
    )
    left_out = "" if layer == "last" else f"model.transformer.resblocks.{count - 1}."
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in _NOT_USED and not (left_out and name.startswith(left_out))
    }
    used = count if layer == "last" else count - 1
    return {**fields, "num_hidden_layers": used, "hidden_act": "gelu"}, kept


def _fields(
    tensors: Mapping[str, Tensor], tokens: str, positions: str, inner: str, source: str
) -> dict[str, Any]:
    try:
        vocabulary, width = tensors[tokens].shape
        length, intermediate = tensors[positions].shape[0], tensors[inner].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: no CLIP text encoder: {error}") from None
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "max_position_embeddings": length,
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
    }
