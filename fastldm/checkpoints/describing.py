"""CompVis's arguments for models of ours; what its classes cannot be is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastldm.checkpoints.first_stage_params import (
    CoderParams,
    FirstStageParams,
    first_stage_config,
)
from fastldm.checkpoints.unet_params import IGNORED, UNetParams, unet_config
from fastldm.checkpoints.yaml_files import parse_fields
from fastldm.errors import ConfigError
from fastldm.models.autoencoder_kl import AutoencoderKL
from fastldm.models.unet_2d import UNet2DModel
from fastldm.models.unet_2d_condition import UNet2DConditionModel
from fastldm.models.vq_model import VQModel
from fastldm.modules.attention import Attention

UNet = UNet2DModel | UNet2DConditionModel
FirstStage = AutoencoderKL | VQModel

_HEADS = frozenset({"attention_head_dim", "num_attention_heads", "num_head_channels"})
_WITHOUT_EFFECT = frozenset(
    {
        # on what the network computes, but for its rounding
        "codebook_ema_decay",
        "codebook_initialization",
        "dead_code_threshold",
        "force_upcast",
        "latents_mean",
        "latents_std",
        "lookup_from_codebook",
        "num_used_embeddings",
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "unknown_index",
        "upcast_attention",
    }
)
_USED_FILE = "used.npy"
"""Which CompVis's class reads before the weights; ours needs no such file."""
_PER_LEVEL = ("layers_per_block", "only_cross_attention", "transformer_layers_per_block")


def unet_arguments(unet: UNet, new_attention_order: bool = False) -> dict[str, Any]:
    """The arguments of the UNetModel that is the same network.

    Args:
        new_attention_order: the order that its packed projections are to be in.

    Raises:
        ConfigError: a field of the config has a value that UNetModel does not have.
    """
    config = unet.config
    channels = config["block_out_channels"]
    arguments: dict[str, Any] = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "num_res_blocks": _one(config["layers_per_block"]),
        "attention_resolutions": [
            2**level for level, name in enumerate(config["down_block_types"]) if "Attn" in name
        ],
        "channel_mult": [width // channels[0] for width in channels],
        "dropout": config["dropout"],
        "conv_resample": config["resample_with_conv"],
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": config["downsample_type"] == "resnet",
        "num_classes": config["num_class_embeds"],
        **_head_arguments(unet),
    }
    if isinstance(config["sample_size"], int):
        arguments["image_size"] = config["sample_size"]
    if new_attention_order:
        arguments["use_new_attention_order"] = True
    if isinstance(unet, UNet2DConditionModel):
        arguments.update(_transformer_arguments(config))
    _check_unet(unet, arguments)
    return arguments


def _transformer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "use_spatial_transformer": True,
        "transformer_depth": _one(config["transformer_layers_per_block"]),
        "context_dim": _one(config["cross_attention_dim"]),
        "use_linear_in_transformer": config["use_linear_projection"],
        "legacy": False,
    }
    only_cross = config["only_cross_attention"]
    if only_cross is True or (isinstance(only_cross, list) and any(only_cross)):
        levels = len(config["block_out_channels"])
        arguments["disable_self_attentions"] = _expanded(only_cross, levels)
    width = config["projection_class_embeddings_input_dim"]
    if config["class_embed_type"] == "simple_projection" and width == 1:
        arguments["num_classes"] = "continuous"
    elif config["class_embed_type"] == "projection" or config["addition_embed_type"] is not None:
        arguments |= {"num_classes": "sequential", "adm_in_channels": width}
    return arguments


def _head_arguments(unet: UNet) -> dict[str, int]:
    sizes = {(module.heads, module.dim_head) for module in _attentions(unet)}
    heads, widths = {heads for heads, _ in sizes}, {width for _, width in sizes}
    if len(heads) <= 1:
        return {"num_heads": min(heads, default=1)}
    if len(widths) == 1:
        return {"num_head_channels": min(widths)}
    raise ConfigError(
        "attention_head_dim: CompVis's UNetModel has one number of heads, or of channels a head, "
        f"at all levels; this model has {sorted(heads)} heads"
    )


def _attentions(unet: UNet) -> list[Attention]:
    return [module for module in unet.modules() if isinstance(module, Attention)]


def _check_unet(unet: UNet, arguments: Mapping[str, Any]) -> None:
    params = parse_fields(UNetParams, arguments, "UNetModel", IGNORED)
    with torch.device("meta"):
        same = type(unet).from_config(unet_config(params))
    _check_same(unet.config, same.config, _HEADS)
    own, theirs = _attentions(unet), _attentions(same)
    if [module.heads for module in own] != [module.heads for module in theirs]:
        raise ConfigError("attention_head_dim: CompVis's UNetModel has no such heads")


def first_stage_arguments(model: FirstStage) -> dict[str, Any]:
    """The arguments of the AutoencoderKL or VQModel that is the same network.

    Raises:
        ConfigError: a field of the config has a value that CompVis's class does not have.
    """
    config = model.config
    channels = config["block_out_channels"]
    is_vq = isinstance(model, VQModel)
    attention = "linear" if config["attention_type"] == "linear" else "vanilla"
    resolution = config["sample_size"]
    resolution = resolution if isinstance(resolution, int) else resolution[0]
    levels = range(len(channels))
    # Attention is named by resolution, so those of the levels must differ.
    resolution = max(resolution, 2 ** len(channels))
    coder = CoderParams(
        ch=channels[0],
        out_ch=config["out_channels"],
        num_res_blocks=config["layers_per_block"],
        attn_resolutions=tuple(
            resolution // 2**level
            for level in levels
            if config["down_block_types"][level].startswith("Attn")
        ),
        in_channels=config["in_channels"],
        z_channels=config["latent_channels"],
        resolution=resolution,
        ch_mult=tuple(width // channels[0] for width in channels),
        double_z=not is_vq,
        dropout=config["dropout"],
        resamp_with_conv=config["resample_with_conv"],
        tanh_out=config["output_activation"] == "tanh",
        attn_type=attention if config["mid_block_add_attention"] else "none",
    )
    params = FirstStageParams(
        type(model).__name__,
        coder,
        model.latent_channels,
        config["num_vq_embeddings"] if is_vq else None,
        is_vq or config["use_quant_conv"],
    )
    with torch.device("meta"):
        same = type(model).from_config(first_stage_config(params))
    _check_same(model.config, same.config)
    arguments: dict[str, Any] = {"embed_dim": params.embed_dim}
    if is_vq:
        arguments["n_embed"] = params.n_embed
        if config["num_used_embeddings"] is not None:
            arguments["remap"] = _USED_FILE
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(coder).items()
        if name not in ("give_pre_end", "use_linear_attn")
    }
    return {**arguments, "ddconfig": fields}


def _check_same(
    own: Mapping[str, Any], theirs: Mapping[str, Any], ignored: frozenset[str] = frozenset()
) -> None:
    """Require that our config is the one that CompVis's arguments give."""
    levels = len(own["block_out_channels"])
    differing = []
    for name, value in own.items():
        if name in _WITHOUT_EFFECT | ignored:
            continue
        pair = (_normal(name, value, own, levels), _normal(name, theirs[name], theirs, levels))
        if pair[0] != pair[1]:
            differing.append(f"{name}={value!r:.60}")
    if differing:
        raise ConfigError(f"CompVis's layout has no model with {', '.join(differing)}")


def _normal(name: str, value: Any, config: Mapping[str, Any], levels: int) -> Any:
    """`value` in one of the forms that mean the same."""
    if name in _PER_LEVEL:
        return _expanded(value, levels)
    if name in ("cross_attention_dim", "layers_per_block"):
        return _one(value)
    if name == "attn_norm_num_groups" and value is None:
        plain = config["resnet_time_scale_shift"] == "default"
        return config["norm_num_groups"] if plain else None
    if name in ("vq_embed_dim", "embed_dim"):
        return config["latent_channels"] if value is None else value
    return value


def _expanded(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _one(value: Any) -> Any:
    """A list of equal entries as one of them."""
    if isinstance(value, list | tuple) and len({repr(entry) for entry in value}) == 1:
        return value[0]
    return value
