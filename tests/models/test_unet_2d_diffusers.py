"""Both UNets against diffusers, field by field: keys, outputs, gradients, both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.models import UNet2DConditionModel, UNet2DModel

ODD_SIZE = {
    "block_out_channels": [8, 16, 16, 16],
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
TWO_LEVELS = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
TWO_LEVELS_2D = {
    **TWO_LEVELS,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
TWO_LEVELS_CROSS = {
    **TWO_LEVELS,
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
ALL_ATTENTION_2D = {
    **TWO_LEVELS_2D,
    "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"],
}


def unconditional(config: dict[str, Any]) -> dict[str, Tensor]:
    size = 2 ** (len(config["block_out_channels"]) - 1) * 2
    return {
        "sample": torch.randn(2, config.get("in_channels", 3), size, size),
        "timestep": torch.tensor([7, 901]),
    }


def conditional(config: dict[str, Any]) -> dict[str, Tensor]:
    inputs = unconditional({"in_channels": 4, **config})
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    width = width[0] if isinstance(width, list) else width
    return {**inputs, "encoder_hidden_states": torch.randn(2, 5, width)}


def with_classes(config: dict[str, Any]) -> dict[str, Tensor]:
    return {**unconditional(config), "class_labels": torch.tensor([3, 0])}


def with_context_and_classes(config: dict[str, Any]) -> dict[str, Tensor]:
    return {**conditional(config), "class_labels": torch.tensor([3, 0])}


def with_context_and_vectors(config: dict[str, Any]) -> dict[str, Tensor]:
    width = config.get("projection_class_embeddings_input_dim", 32)
    return {**conditional(config), "class_labels": torch.randn(2, width)}


def with_vectors(config: dict[str, Any]) -> dict[str, Tensor]:
    return {**unconditional(config), "class_labels": torch.randn(2, 32)}


def of_odd_size(config: dict[str, Any]) -> dict[str, Tensor]:
    return {**conditional(config), "sample": torch.randn(2, 4, 11, 13)}


def with_guidance_embedding(config: dict[str, Any]) -> dict[str, Tensor]:
    condition = torch.randn(2, config["time_cond_proj_dim"])
    return {**conditional(config), "timestep_cond": condition}


def with_mask(config: dict[str, Any]) -> dict[str, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    return {**conditional(config), "encoder_attention_mask": mask}


def with_controlnet(config: dict[str, Any]) -> dict[str, Any]:
    residuals = [torch.randn(2, 8, 4, 4)] * 2 + [torch.randn(2, c, 2, 2) for c in (8, 16)]
    return {
        **conditional(config),
        "down_block_additional_residuals": residuals,
        "mid_block_additional_residual": torch.randn(2, 16, 2, 2),
    }


def with_adapter(config: dict[str, Any]) -> dict[str, Any]:
    residuals = [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2), torch.randn(2, 16, 2, 2)]
    return {**conditional(config), "down_intrablock_additional_residuals": residuals}


def at_noise_level(config: dict[str, Any]) -> dict[str, Any]:
    return {**unconditional(config), "timestep": torch.tensor([0.7, 11.0])}


Case = tuple[type, dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]
CALLS: dict[str, Case] = {
    "odd size": (UNet2DConditionModel, ODD_SIZE, of_odd_size),
    "mask": (UNet2DConditionModel, TWO_LEVELS_CROSS, with_mask),
    "controlnet": (UNet2DConditionModel, TWO_LEVELS_CROSS, with_controlnet),
    "adapter": (UNet2DConditionModel, TWO_LEVELS_CROSS, with_adapter),
}
FIELDS_2D: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "ddpm": (
        {"downsample_padding": 0, "freq_shift": 1, "attention_head_dim": None, "norm_eps": 1e-6},
        unconditional,
    ),
    "sin first": ({"flip_sin_to_cos": False}, unconditional),
    "fourier": ({"time_embedding_type": "fourier"}, at_noise_level),
    "learned": ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, unconditional),
    "resnet resampling": (
        {**ALL_ATTENTION_2D, "downsample_type": "resnet", "upsample_type": "resnet"},
        unconditional,
    ),
    "resnet blocks": (
        {
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "upsample_type": "resnet",
        },
        unconditional,
    ),
    "attention then conv": (ALL_ATTENTION_2D, unconditional),
    "scale shift": ({"resnet_time_scale_shift": "scale_shift"}, unconditional),
    "scale shift, normed": (
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
        unconditional,
    ),
    "classes": ({"num_class_embeds": 5}, with_classes),
    "noise levels": ({"class_embed_type": "timestep"}, with_classes),
    "identity": ({"class_embed_type": "identity"}, with_vectors),
    "mid without attention": ({"add_attention": False}, unconditional),
    "no mid": ({"mid_block_type": None}, unconditional),
    "mid scale": ({"mid_block_scale_factor": 1.4}, unconditional),
    "gelu": ({"act_fn": "gelu", "time_embedding_dim": 20}, unconditional),
    "centred": ({"center_input_sample": True}, unconditional),
    "three layers": ({"layers_per_block": 3}, unconditional),
}
FIELDS_CROSS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "projected classes": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 9},
        with_context_and_vectors,
    ),
    "linear classes": (
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 9},
        with_context_and_vectors,
    ),
    "noise levels": ({"class_embed_type": "timestep"}, with_context_and_classes),
    "identity": ({"class_embed_type": "identity"}, with_context_and_vectors),
    "appended classes": (
        {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 9,
            "class_embeddings_concat": True,
        },
        with_context_and_vectors,
    ),
    "pooled text": (
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
        conditional,
    ),
    "projected text": ({"encoder_hid_dim": 7}, conditional),
    "guidance embedding": ({"time_cond_proj_dim": 6}, with_guidance_embedding),
    "plain attention": (
        {
            "down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "AttnUpBlock2D"],
            "attention_head_dim": [4, 2],
        },
        conditional,
    ),
    "resnet blocks": (
        {
            "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        },
        conditional,
    ),
    "mid of one residual block": ({"mid_block_type": "UNetMidBlock2D"}, conditional),
    "no mid": ({"mid_block_type": None}, conditional),
    "uneven layers": (
        {"layers_per_block": [2, 1], "mid_block_scale_factor": 1.4, "downsample_padding": 0},
        conditional,
    ),
    "uneven transformers": (
        {
            "down_block_types": ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2,
            "layers_per_block": 2,
            "transformer_layers_per_block": [[1, 2], 1],
            "reverse_transformer_layers_per_block": [[2, 1, 1], [0, 1, 2]],
        },
        conditional,
    ),
    "only cross-attention": ({"only_cross_attention": True}, conditional),
    "scale shift": ({"resnet_time_scale_shift": "scale_shift"}, conditional),
    "kernels": ({"conv_in_kernel": 1, "conv_out_kernel": 5}, conditional),
    "fourier": ({"time_embedding_type": "fourier"}, conditional),
    "activations": (
        {"act_fn": "gelu", "time_embedding_act_fn": "mish", "timestep_post_act": "relu"},
        conditional,
    ),
    "centred": ({"center_input_sample": True, "freq_shift": 1}, conditional),
}
CASES: dict[str, Case] = {
    **CALLS,
    **{
        f"2d, {name}": (UNet2DModel, {**TWO_LEVELS_2D, **changes}, inputs)
        for name, (changes, inputs) in FIELDS_2D.items()
    },
    **{
        f"cross, {name}": (UNet2DConditionModel, {**TWO_LEVELS_CROSS, **changes}, inputs)
        for name, (changes, inputs) in FIELDS_CROSS.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_diffusers(
    name: str, compare_with_diffusers: Callable[..., None]
) -> None:
    ours_class, config, make_inputs = CASES[name]
    compare_with_diffusers(ours_class, config, make_inputs(config))
