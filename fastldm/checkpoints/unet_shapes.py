"""The arguments of a UNetModel from the names and shapes of its weights.

Names and shapes say everything but the number of heads, which the published models are listed
with here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastldm.checkpoints.unet_params import UNetParams
from fastldm.errors import CheckpointError

_HEADS: dict[tuple[int, tuple[int, ...], int | None], dict[str, int]] = {
    # model_channels, channel_mult, context_dim: heads, or channels a head
    (224, (1, 2, 3, 4), None): {"num_head_channels": 32},  # CelebA-HQ, FFHQ, bedrooms
    (192, (1, 2, 2, 4, 4), None): {"num_heads": 8},  # churches
    (160, (1, 2, 2, 4), None): {"num_head_channels": 32},  # super-resolution
    (256, (1, 2, 3, 4), None): {"num_heads": 8},  # inpainting
    (128, (1, 4, 8), None): {"num_heads": 8},  # semantic synthesis
    (256, (1, 2, 4), 512): {"num_head_channels": 32},  # ImageNet, vq-f8
    (192, (1, 2, 3, 5), 512): {"num_heads": 1},  # ImageNet, vq-f4
    (192, (1, 2, 3, 5), 640): {"num_head_channels": 32},  # text, vq-f4
    (128, (1, 2, 3, 4), 512): {"num_head_channels": 32},  # layout
    (448, (1, 2, 3, 4), 768): {"num_head_channels": 32},  # retrieval-augmented
    (320, (1, 2, 4, 4), 1280): {"num_heads": 8},  # text, kl-f8
    (320, (1, 2, 4, 4), 768): {"num_heads": 8},  # Stable Diffusion 1
    (320, (1, 2, 4, 4), 1024): {"num_head_channels": 64},  # Stable Diffusion 2
    (256, (1, 2, 2, 4), 1024): {"num_heads": 8},  # Stable Diffusion's ×4 upscaler
    (320, (1, 2, 4), 2048): {"num_head_channels": 64},  # SDXL
    (384, (1, 2, 4, 4), 1280): {"num_head_channels": 64},  # SDXL's refiner
}

_DEPTH = re.compile(r"input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\.norm1\.weight")


class _Blocks(NamedTuple):
    """How the numbered blocks form levels: each has `layers` residual blocks and a downsampler."""

    levels: int
    layers: int
    resampling: str
    """"conv", "resnet" or "plain"."""

    def of_level(self, level: int) -> range:
        """Numbers of the input blocks that begin with a residual block of the level."""
        first = 1 + level * (self.layers + 1)
        return range(first, first + self.layers)


def infer_unet(tensors: Mapping[str, Tensor], source: str) -> UNetParams:
    """The arguments of the UNetModel that has these weights.

    Args:
        tensors: names without prefix; only shapes are used.
        source: for messages.

    Raises:
        CheckpointError: they are not those of a UNetModel.
    """
    try:
        return _infer(tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source}: its UNet is none of CompVis's, as far as names and shapes tell "
            f"({type(error).__name__}: {error}); give config="
        ) from None


def _infer(tensors: Mapping[str, Tensor]) -> UNetParams:
    def shape(name: str) -> tuple[int, ...]:
        return tuple(tensors[name].shape)

    blocks = _levels(tensors)
    conv_in = shape("input_blocks.0.0.weight")
    channels = conv_in[0]
    widths = [
        shape(f"input_blocks.{blocks.of_level(level)[0]}.0.in_layers.2.weight")[0]
        for level in range(blocks.levels)
    ]
    if not channels or widths[0] != channels or any(width % channels for width in widths):
        raise ValueError(f"levels of {widths} channels after {channels}")
    first = "input_blocks.1.0"
    fields: dict[str, Any] = {
        "in_channels": conv_in[1],
        "model_channels": channels,
        "out_channels": shape("out.2.weight")[0],
        "num_res_blocks": blocks.layers,
        "attention_resolutions": tuple(
            2**level
            for level in range(blocks.levels)
            if f"input_blocks.{blocks.of_level(level)[0]}.1.norm.weight" in tensors
        ),
        "channel_mult": tuple(width // channels for width in widths),
        "conv_resample": blocks.resampling != "plain",
        "resblock_updown": blocks.resampling == "resnet",
        "dims": len(conv_in) - 2,
        "use_scale_shift_norm": shape(f"{first}.emb_layers.1.bias")[0] == 2 * widths[0],
        **_classes(tensors),
        **_transformers(tensors, blocks),
    }
    if "id_predictor.0.weight" in tensors:
        fields["n_embed"] = shape("id_predictor.1.weight")[0]
    params = UNetParams(**fields)
    assert params.context_dim is None or isinstance(params.context_dim, int)
    key = (params.model_channels, params.channel_mult, params.context_dim)
    return UNetParams(**{**fields, **_HEADS.get(key, {})})


def _levels(tensors: Mapping[str, Tensor]) -> _Blocks:
    numbers = {
        int(name.split(".")[1])
        for name in tensors
        if name.startswith("input_blocks.") and name.split(".")[1].isdecimal()
    }
    count = max(numbers) + 1
    # A pooling has no weights, so of the blocks one in two at most is absent.
    if count > 2 * len(numbers):
        raise ValueError(f"input_blocks.{count - 1} without those before it")
    resampling = "conv"
    period = count
    for number in range(1, count):
        if number not in numbers:
            resampling, period = "plain", number
        elif f"input_blocks.{number}.0.op.weight" in tensors:
            period = number
        elif any(f"output_blocks.{number - 1}.{k}.in_layers.0.weight" in tensors for k in (1, 2)):
            # The way up has one residual block more, so there the last one is number − 1.
            resampling, period = "resnet", number
        else:
            continue
        break
    if count % period or period < 2:
        raise ValueError(f"{count} blocks in levels of {period}")
    return _Blocks(count // period, period - 1, resampling)


def _classes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "label_emb.0.0.weight" in tensors:
        return {
            "num_classes": "sequential",
            "adm_in_channels": tensors["label_emb.0.0.weight"].shape[1],
        }
    if "label_emb.bias" in tensors:
        return {"num_classes": "continuous"}
    if "label_emb.weight" in tensors:
        return {"num_classes": tensors["label_emb.weight"].shape[0]}
    return {}


def _transformers(tensors: Mapping[str, Tensor], blocks: _Blocks) -> dict[str, Any]:
    middle = "middle_block.1.transformer_blocks"
    if f"{middle}.0.norm1.weight" not in tensors:
        return {}
    depth_of_block: dict[int, int] = {}
    for name in tensors:
        found = _DEPTH.fullmatch(name)
        if found:
            number, index = int(found[1]), int(found[2])
            depth_of_block[number] = max(depth_of_block.get(number, 0), index + 1)
    in_middle = 1
    while f"{middle}.{in_middle}.norm1.weight" in tensors:
        in_middle += 1
    depths = [
        depth_of_block.get(blocks.of_level(level)[0], in_middle) for level in range(blocks.levels)
    ]
    context = tensors[f"{middle}.0.attn2.to_k.weight"].shape[1]
    return {
        "use_spatial_transformer": True,
        "transformer_depth": depths[0] if len(set(depths)) == 1 else tuple(depths),
        "transformer_depth_middle": in_middle,
        "context_dim": context,
        "use_linear_in_transformer": tensors["middle_block.1.proj_in.weight"].ndim == 2,
        "disable_self_attentions": _only_cross(tensors, blocks, context),
    }


def _only_cross(
    tensors: Mapping[str, Tensor], blocks: _Blocks, context: int
) -> tuple[bool, ...] | None:
    """Whether each level attends to the context where others have self-attention."""
    flags = []
    for level in range(blocks.levels):
        name = f"input_blocks.{blocks.of_level(level)[0]}.1.transformer_blocks.0.attn1"
        if f"{name}.to_k.weight" in tensors:
            width = tensors[f"{name}.to_q.weight"].shape[1]
            flags.append(tensors[f"{name}.to_k.weight"].shape[1] == context != width)
        else:
            flags.append(False)
    return tuple(flags) if any(flags) else None
