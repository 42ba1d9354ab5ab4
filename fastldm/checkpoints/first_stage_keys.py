"""Where CompVis's AutoencoderKL and VQModel keep the weights of ours."""

from __future__ import annotations

from fastldm.checkpoints.keymap import Place, Places
from fastldm.errors import ConfigError
from fastldm.models.autoencoder_kl import AutoencoderKL
from fastldm.models.vq_model import VQModel

FirstStage = AutoencoderKL | VQModel

LEFT_OUT = ("quantize.ema_counts", "quantize.ema_sums", "quantize.data_initialized")
"""State of a codebook that learns by moving averages; it has no part in what a model gives."""

_BETWEEN = ("quant_conv", "post_quant_conv", "quantize.embedding", "quantize.used")
_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_ATTENTION = {
    "group_norm": Place("norm"),
    "to_q": Place("q", trailing=2),
    "to_k": Place("k", trailing=2),
    "to_v": Place("v", trailing=2),
    "to_out.0": Place("proj_out", trailing=2),
}
_LINEAR_ATTENTION = {"to_qkv": Place("to_qkv"), "to_out": Place("to_out")}


def first_stage_places(model: FirstStage) -> Places:
    """Where the weights of a first stage are.

    Raises:
        ConfigError: CompVis's layout cannot hold such a model.
    """
    config = model.config
    if config.get("norm_type", "group") != "group":
        raise ConfigError("norm_type: CompVis's layout has GroupNorms only, got 'spatial'")
    attention = _LINEAR_ATTENTION if config["attention_type"] == "linear" else _ATTENTION
    levels = len(config["block_out_channels"])
    places = {name: Place(name) for name in _BETWEEN}

    def add_block(ours: str, theirs: str, kind: str) -> None:
        names = attention if kind == "attn" else {a: Place(b) for a, b in _RESNET.items()}
        for inner, place in names.items():
            places[f"{ours}.{inner}"] = place._replace(name=f"{theirs}.{place.name}")

    for coder in ("encoder", "decoder"):
        for ours, theirs in _ENDS.items():
            places[f"{coder}.{ours}"] = Place(f"{coder}.{theirs}")
        add_block(f"{coder}.mid_block.resnets.0", f"{coder}.mid.block_1", "block")
        add_block(f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1", "attn")
        add_block(f"{coder}.mid_block.resnets.1", f"{coder}.mid.block_2", "block")
    for coder, way, layers in (
        ("encoder", "down", config["layers_per_block"]),
        ("decoder", "up", config["layers_per_block"] + 1),
    ):
        for position in range(levels):
            level = position if way == "down" else levels - 1 - position
            ours, theirs = f"{coder}.{way}_blocks.{position}", f"{coder}.{way}.{level}"
            for layer in range(layers):
                add_block(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", "block")
                add_block(f"{ours}.attentions.{layer}", f"{theirs}.attn.{layer}", "attn")
            places[f"{ours}.{way}samplers.0"] = Place(f"{theirs}.{way}sample")
    return places
