"""CompVis's cond stages, and the configs of our conditioners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastldm.checkpoints.ldm_params import ConditionParams
from fastldm.checkpoints.yaml_files import parse_fields
from fastldm.errors import CheckpointError, ConfigError

_CLASSES_WITH_NONE = 1001
"""Rows of the published ImageNet model with guidance; the last one stands for "no class"."""
_BERT_HEADS, _BERT_HEAD_DIM = 8, 64
_MOST_LAYERS = 256


@dataclass(frozen=True)
class _ClassEmbedder:
    embed_dim: int
    n_classes: int = 1000


@dataclass(frozen=True)
class _Bert:
    n_embed: int
    n_layer: int
    vocab_size: int = 30522
    max_seq_len: int = 77
    embedding_dropout: float = 0.0


@dataclass(frozen=True)
class _SpatialRescaler:
    n_stages: int = 1
    method: str = "bilinear"
    multiplier: float = 0.5
    in_channels: int = 3
    out_channels: int | None = None
    bias: bool = False


@dataclass(frozen=True)
class _Clip:
    layer: str = "last"


CLIP_TARGETS = ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder")
_KINDS: dict[str, tuple[str, type[Any], frozenset[str]]] = {
    # last part of the target: our class, its arguments, those without effect on the weights
    "ClassEmbedder": ("ClassEmbedder", _ClassEmbedder, frozenset({"key"})),
    "BERTEmbedder": ("TextEncoder", _Bert, frozenset({"device", "use_tokenizer"})),
    "TransformerEmbedder": ("TextEncoder", _Bert, frozenset({"device"})),
    "SpatialRescaler": ("SpatialRescaler", _SpatialRescaler, frozenset()),
    "FrozenCLIPEmbedder": (
        "CLIPTextModel",
        _Clip,
        frozenset({"device", "freeze", "max_length", "version"}),
    ),
    "FrozenOpenCLIPEmbedder": (
        "CLIPTextModel",
        _Clip,
        frozenset({"arch", "device", "freeze", "max_length", "version"}),
    ),
}


def condition_class(params: ConditionParams) -> str | None:
    """The name of the class for a cond stage; None for one that leaves conditions as they are.

    Raises:
        ConfigError: fastldm has none.
    """
    if params.target == "Identity":
        return None
    if params.target not in _KINDS:
        raise ConfigError(
            f"cond_stage_config.target: fastldm has no {params.target!r:.60}; accepted: "
            f"{', '.join(_KINDS)}, Identity; no other class is ever looked up"
        )
    return _KINDS[params.target][0]


def condition_config(params: ConditionParams) -> dict[str, Any]:
    """The config of that class; of a CLIP encoder, which layer's output is taken.

    Raises:
        ConfigError: an argument is unknown or has a value that our class does not have.
    """
    condition_class(params)
    _, kind, ignored = _KINDS[params.target]
    fields = parse_fields(kind, params.params, "cond_stage_config.params", ignored)
    if isinstance(fields, _ClassEmbedder):
        return _class_fields(fields.n_classes, fields.embed_dim)
    if isinstance(fields, _Bert):
        if fields.embedding_dropout:
            raise ConfigError(
                f"embedding_dropout: TextEncoder has none of its own, got "
                f"{fields.embedding_dropout}"
            )
        if fields.n_layer > _MOST_LAYERS:
            raise ConfigError(f"n_layer: expected at most {_MOST_LAYERS}, got {fields.n_layer}")
        return {
            "vocab_size": fields.vocab_size,
            "max_length": fields.max_seq_len,
            "hidden_size": fields.n_embed,
            "num_layers": fields.n_layer,
            "num_heads": _BERT_HEADS,
            "head_dim": _BERT_HEAD_DIM,
        }
    if isinstance(fields, _SpatialRescaler):
        return {
            "num_stages": fields.n_stages,
            "method": fields.method,
            "multiplier": fields.multiplier,
            "in_channels": fields.in_channels,
            "out_channels": fields.out_channels,
            "bias": fields.bias,
        }
    return {"layer": fields.layer}


def infer_condition(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Any]]:
    """The class and config of the cond stage that has these weights, named without prefix.

    A `SpatialRescaler` is taken to be that of the published models, which halve twice.

    Raises:
        CheckpointError: they are those of no cond stage that fastldm has.
    """
    try:
        if "embedding.weight" in tensors:
            rows, width = tensors["embedding.weight"].shape
            return "ClassEmbedder", _class_fields(rows, width)
        if "channel_mapper.weight" in tensors:
            return "SpatialRescaler", {
                "num_stages": 2,
                "in_channels": tensors["channel_mapper.weight"].shape[1],
                "out_channels": tensors["channel_mapper.weight"].shape[0],
                "bias": "channel_mapper.bias" in tensors,
            }
        if "transformer.token_emb.weight" in tensors:
            return "TextEncoder", _infer_bert(tensors)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{source}: its cond stage is none of CompVis's, as far as names and shapes tell "
            f"({type(error).__name__}: {error}); give config="
        ) from None
    if any(name.startswith(("transformer.text_model.", "model.")) for name in tensors):
        return "CLIPTextModel", {
            "layer": "last" if "model.ln_final.weight" not in tensors else "penultimate"
        }
    raise CheckpointError(
        f"{source}: fastldm has no cond stage with {', '.join(list(tensors)[:3])}; give "
        "conditioner="
    )


def _class_fields(rows: int, width: int) -> dict[str, Any]:
    with_none = rows == _CLASSES_WITH_NONE
    return {
        "num_classes": rows - with_none,
        "hidden_size": width,
        "with_unconditional_class": with_none,
    }


def _infer_bert(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = tensors["transformer.token_emb.weight"].shape
    layers = "transformer.attn_layers.layers"
    count = 0
    while f"{layers}.{2 * count}.1.to_q.weight" in tensors:
        count += 1
    inner = tensors[f"{layers}.0.1.to_q.weight"].shape[0]
    if inner % _BERT_HEADS:
        raise ValueError(f"{inner} channels for {_BERT_HEADS} heads")
    wide = tensors[f"{layers}.1.1.net.0.0.weight"].shape[0]
    return {
        "vocab_size": vocabulary,
        "max_length": tensors["transformer.pos_emb.emb.weight"].shape[0],
        "hidden_size": width,
        "num_layers": count,
        "num_heads": _BERT_HEADS,
        "head_dim": inner // _BERT_HEADS,
        "intermediate_size": None if wide == 4 * width else wide,
    }
