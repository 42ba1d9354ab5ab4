"""The CLIP text encoders of Stable Diffusion's files, as transformers' classes."""

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
from fastldm.checkpoints.keymap import make_rows, to_compvis, to_fastldm
from fastldm.errors import CheckpointError, ConfigError

_HEAD_WIDTH = 64
_LAYER = re.compile(r"model\.transformer\.resblocks\.(\d+)\.ln_1\.weight")
_PROJECTION = "model.text_projection"
PROJECTION_WEIGHT = "text_projection.weight"
_NOT_USED = (_PROJECTION, "model.logit_scale")
"""Of OpenCLIP: they make one vector of a text, which only SDXL's UNets see."""
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
    if open_clip:
        fields, tensors = _open_clip_fields(tensors, layer, source)
    else:
        fields, tensors = _clip_fields(tensors, source)
    model = _empty_model("CLIPTextModel", fields, source)
    rows = make_rows(conditioner_places(model, open_clip), model.state_dict())
    return _fill(model, to_fastldm(rows, tensors, model.state_dict(), source, torch_dtype))


def load_projected_clip(
    tensors: Mapping[str, Tensor], source: str, torch_dtype: torch.dtype | None
) -> nn.Module:
    """SDXL's second text encoder, a CLIPTextModelWithProjection.

    Args:
        tensors: in OpenCLIP's layout, ``model.…``.
        source: for messages.
        torch_dtype: of the result.

    Raises:
        CheckpointError: the weights are not those of OpenCLIP's text encoder.
        ConfigError: transformers is not installed.
    """
    fields, kept = _open_clip_fields(tensors, "last", source)
    projection = tensors.get(_PROJECTION)
    if projection is None or projection.ndim != 2:
        raise CheckpointError(f"{source}: no {_PROJECTION} [width, projection]")
    # The token with the highest number ends a text, as for OpenAI's models.
    fields |= {"projection_dim": projection.shape[1], "eos_token_id": 2}
    model = _empty_model("CLIPTextModelWithProjection", fields, source)
    expected = model.state_dict()
    rows = make_rows(conditioner_places(model, open_clip=True), expected, [PROJECTION_WEIGHT])
    state = to_fastldm(rows, kept, expected, source, torch_dtype)
    dtype = torch_dtype or expected[PROJECTION_WEIGHT].dtype
    state[PROJECTION_WEIGHT] = projection.T.to(dtype, copy=True).contiguous()
    return _fill(model, state)


def projected_clip_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a CLIPTextModelWithProjection in OpenCLIP's layout, ``model.…``."""
    state = model.state_dict()
    rows = make_rows(conditioner_places(model, open_clip=True), state, [PROJECTION_WEIGHT])
    projection = state[PROJECTION_WEIGHT].detach().T.contiguous()
    return {**to_compvis(rows, state), _PROJECTION: projection}


def _empty_model(class_name: str, fields: Mapping[str, Any], source: str) -> Any:
    """A model of transformers without storage."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{source}: its text encoder is CLIP's, which needs transformers; or give conditioner="
        ) from None
    try:
        with torch.device("meta"):
            config = transformers.CLIPTextConfig(**fields)
            return getattr(transformers, class_name)(config)
    except Exception as error:  # sizes that transformers refuses, in several ways
        raise CheckpointError(f"{source}: no CLIP text encoder has {fields}: {error}") from None


def _fill(model: Any, state: Mapping[str, Tensor]) -> nn.Module:
    model.load_state_dict(state, assign=True)
    # The one buffer that no file holds.
    positions = torch.arange(model.config.max_position_embeddings).expand(1, -1)
    for module in model.modules():
        if "position_ids" in module._buffers:
            module._buffers["position_ids"] = positions.clone()
    filled: nn.Module = model.eval()
    return filled


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
