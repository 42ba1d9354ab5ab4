"""Where CompVis's cond stages keep the weights of our conditioners and of CLIP's text encoder."""

from __future__ import annotations

from torch import nn

from fastldm.checkpoints.keymap import Place, Places
from fastldm.errors import ConfigError
from fastldm.models.class_embedder import ClassEmbedder
from fastldm.models.spatial_rescaler import SpatialRescaler
from fastldm.models.text_encoder import TextEncoder

_BERT_ATTENTION = {
    "self_attn_layer_norm": "0",
    "self_attn.q_proj": "1.to_q",
    "self_attn.k_proj": "1.to_k",
    "self_attn.v_proj": "1.to_v",
    "self_attn.out_proj": "1.to_out",
}
_BERT_FEED_FORWARD = {"final_layer_norm": "0", "fc1": "1.net.0.0", "fc2": "1.net.2"}

_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
CLIP_PREFIX = "transformer.text_model."
OPEN_CLIP_PREFIX = "model."


def conditioner_places(model: nn.Module, open_clip: bool = False) -> Places:
    """Where the weights of a cond stage are.

    Args:
        open_clip: a CLIP text encoder is in OpenCLIP's layout, as in Stable Diffusion 2.

    Raises:
        ConfigError: CompVis's layout cannot hold such a model.
    """
    if isinstance(model, ClassEmbedder):
        return {"embedding": Place("embedding")}
    if isinstance(model, SpatialRescaler):
        return {"channel_mapper": Place("channel_mapper")}
    if isinstance(model, TextEncoder):
        return _bert_places(model)
    if type(model).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        return _open_clip_places(model) if open_clip else _clip_places(model)
    raise ConfigError(
        f"conditioner: CompVis's layout has no place for a {type(model).__name__}; accepted: "
        "ClassEmbedder, TextEncoder, SpatialRescaler and transformers' CLIPTextModel"
    )


def _bert_places(model: TextEncoder) -> Places:
    places = {
        "model.embed_tokens": Place("transformer.token_emb"),
        "model.embed_positions": Place("transformer.pos_emb.emb"),
        "model.layer_norm": Place("transformer.norm"),
        "to_logits": Place("transformer.to_logits"),
    }
    for layer in range(len(model.model.layers)):
        for parts, number in ((_BERT_ATTENTION, 2 * layer), (_BERT_FEED_FORWARD, 2 * layer + 1)):
            for ours, theirs in parts.items():
                name = f"transformer.attn_layers.layers.{number}.{theirs}"
                places[f"model.layers.{layer}.{ours}"] = Place(name)
    return places


def clip_prefix(model: nn.Module) -> str:
    """What the names of a CLIPTextModel begin with, which depends on transformers' version."""
    nested = any(name.startswith("text_model.") for name, _ in model.named_parameters())
    return "text_model." if nested else ""


def _clip_places(model: nn.Module) -> Places:
    prefix = clip_prefix(model)
    return {
        f"{prefix}{part}": Place(f"{CLIP_PREFIX}{part}")
        for part in ("embeddings", "encoder", "final_layer_norm")
    }


def _open_clip_places(model: nn.Module) -> Places:
    prefix = clip_prefix(model)
    places = {
        "embeddings.token_embedding": Place("token_embedding"),
        "embeddings.position_embedding.weight": Place("positional_embedding"),
        "final_layer_norm": Place("ln_final"),
    }
    for layer in range(model.config.num_hidden_layers):  # type: ignore[union-attr, arg-type]
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for inner, place in _OPEN_CLIP_LAYER.items():
            places[f"{ours}.{inner}"] = Place(f"{theirs}.{place}")
        for part in ("q_proj", "k_proj", "v_proj"):
            for leaf in ("weight", "bias"):
                name = f"{theirs}.attn.in_proj_{leaf}"
                places[f"{ours}.self_attn.{part}.{leaf}"] = Place(name)
    return {
        f"{prefix}{ours}": place._replace(name=f"{OPEN_CLIP_PREFIX}{place.name}")
        for ours, place in places.items()
    }
