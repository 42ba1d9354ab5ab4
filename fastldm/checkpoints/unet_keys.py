"""Where CompVis's UNetModel keeps the weights of our UNets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from fastldm.checkpoints.keymap import Place, Places
from fastldm.errors import ConfigError
from fastldm.models.unet_2d import UNet2DModel
from fastldm.models.unet_2d_condition import UNet2DConditionModel
from fastldm.modules.attention import Attention
from fastldm.modules.resnet import ResnetBlock2D
from fastldm.modules.sampling import Downsample2D
from fastldm.modules.unet_blocks import UNetDownBlock2D, UNetUpBlock2D

UNet = UNet2DModel | UNet2DConditionModel

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LABELS = {
    # an embedding, or a linear layer of one number
    "class_embedding": "label_emb",
    # two linear layers of a vector
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def unet_places(unet: UNet, new_attention_order: bool = False) -> Places:
    """Where the weights of `unet` are.

    Args:
        new_attention_order: the packed projections of plain attention are divided into queries,
            keys and values first and into heads then (``use_new_attention_order``); otherwise into
            heads first, as in all published models.

    Raises:
        ConfigError: CompVis's layout cannot hold such a model.
    """
    if unet.config.get("mid_block_type") is None or unet.mid_block is None:
        raise ConfigError("mid_block_type: CompVis's UNetModel always has a middle block")
    places = {ours: Place(theirs) for ours, theirs in {**_ENDS, **_LABELS}.items()}
    for theirs, ours, module in _blocks(unet):
        places.update(_block_places(theirs, ours, module, new_attention_order))
    return places


def _blocks(unet: UNet) -> Iterator[tuple[str, str, nn.Module]]:
    """Their name, our name and our module, of every block in their order."""
    number = 1
    for level, down in enumerate(cast(Iterable[UNetDownBlock2D], unet.down_blocks)):
        ours = f"down_blocks.{level}"
        for layer, resnet in enumerate(down.resnets):
            yield f"input_blocks.{number}.0", f"{ours}.resnets.{layer}", resnet
            if down.attentions is not None:
                attention = down.attentions[layer]
                yield f"input_blocks.{number}.1", f"{ours}.attentions.{layer}", attention
            number += 1
        if down.downsamplers is not None:
            yield f"input_blocks.{number}.0", f"{ours}.downsamplers.0", down.downsamplers[0]
            number += 1

    assert unet.mid_block is not None
    middle = unet.mid_block
    attentions: Iterable[nn.Module] = middle.attentions or ()
    for position, (kind, index, module) in enumerate(
        [
            ("resnets", 0, middle.resnets[0]),
            *(("attentions", index, module) for index, module in enumerate(attentions)),
            *(("resnets", 1, module) for module in middle.resnets[1:]),
        ]
    ):
        yield f"middle_block.{position}", f"mid_block.{kind}.{index}", module

    number = 0
    for level, up in enumerate(cast(Iterable[UNetUpBlock2D], unet.up_blocks)):
        ours = f"up_blocks.{level}"
        for layer, resnet in enumerate(up.resnets):
            yield f"output_blocks.{number}.0", f"{ours}.resnets.{layer}", resnet
            if up.attentions is not None:
                attention = up.attentions[layer]
                yield f"output_blocks.{number}.1", f"{ours}.attentions.{layer}", attention
            number += 1
        if up.upsamplers is not None:
            position = 1 if up.attentions is None else 2
            theirs = f"output_blocks.{number - 1}.{position}"
            yield theirs, f"{ours}.upsamplers.0", up.upsamplers[0]


def _block_places(
    theirs: str, ours: str, module: nn.Module, new_attention_order: bool
) -> dict[str, Place]:
    if isinstance(module, ResnetBlock2D):
        return {f"{ours}.{a}": Place(f"{theirs}.{b}") for a, b in _RESNET.items()}
    if isinstance(module, Downsample2D):
        return {f"{ours}.conv": Place(f"{theirs}.op")}
    if isinstance(module, Attention):
        heads = 1 if new_attention_order else module.heads
        packed = Place(f"{theirs}.qkv", trailing=1, heads=heads)
        return {
            f"{ours}.group_norm": Place(f"{theirs}.norm"),
            **{f"{ours}.{part}": packed for part in ("to_q", "to_k", "to_v")},
            f"{ours}.to_out.0": Place(f"{theirs}.proj_out", trailing=1),
        }
    # Transformers and upsampling convolutions have the same names inside.
    return {ours: Place(theirs)}


def has_plain_attention(unet: Any) -> bool:
    """Whether the order inside packed projections makes a difference for `unet`."""
    return any(isinstance(module, Attention) and module.heads > 1 for _, _, module in _blocks(unet))
