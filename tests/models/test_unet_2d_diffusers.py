"""Both UNets against diffusers: same keys, outputs and gradients, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastldm.models import UNet2DConditionModel, UNet2DModel

CELEBAHQ = {
    "sample_size": 64,
    "block_out_channels": [224, 448, 672, 896],
    "attention_head_dim": 32,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
}
SD_1 = {"sample_size": 64, "cross_attention_dim": 768}
SD_2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_REFINER = {
    **SDXL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "cross_attention_dim": 1024,
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
TEXT2IM_LARGE = {"sample_size": 32, "cross_attention_dim": 1280}
SUPER_RESOLUTION = {
    "sample_size": 64,
    "in_channels": 6,
    "block_out_channels": [160, 320, 320, 640],
    "attention_head_dim": 32,
    "down_block_types": [*["DownBlock2D"] * 3, "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", *["UpBlock2D"] * 3],
}

FULL_SIZE = {
    "ldm-celebahq-256": (UNet2DModel, CELEBAHQ),
    "ldm-super-resolution-4x": (UNet2DModel, SUPER_RESOLUTION),
    "ldm-text2im-large-256": (UNet2DConditionModel, TEXT2IM_LARGE),
    "sd-1.5": (UNet2DConditionModel, SD_1),
    "sd-1.5-inpainting": (UNet2DConditionModel, {**SD_1, "in_channels": 9}),
    "sd-2.1": (UNet2DConditionModel, SD_2),
    "sd-x4-upscaler": (UNet2DConditionModel, UPSCALER),
    "sdxl-base": (UNet2DConditionModel, SDXL),
    "sdxl-refiner": (UNet2DConditionModel, SDXL_REFINER),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys_and_shapes_are_those_of_diffusers(name: str) -> None:
    ours, config = FULL_SIZE[name]
    with torch.device("meta"):
        expected = getattr(diffusers, ours.__name__)(**config).state_dict()
        actual = ours.from_config(config).state_dict()
    assert {key: value.shape for key, value in actual.items()} == {
        key: value.shape for key, value in expected.items()
    }


def narrow(config: dict[str, Any], channels: list[int], **changes: Any) -> dict[str, Any]:
    return {**config, "block_out_channels": channels, "norm_num_groups": 4, **changes}


NARROW_2D = narrow(CELEBAHQ, [8, 16, 24, 32], attention_head_dim=8)
NARROW_SD = narrow(SD_1, [8, 16, 16, 16], cross_attention_dim=12)
NARROW_SDXL = narrow(
    SDXL,
    [8, 16, 24],
    cross_attention_dim=12,
    attention_head_dim=[1, 2, 4],
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=6 * 6 + 10,
)
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


def with_text_and_sizes(config: dict[str, Any]) -> dict[str, Any]:
    numbers = 5 if len(config["block_out_channels"]) == 4 else 6
    text = config["projection_class_embeddings_input_dim"] - 6 * numbers
    added = {
        "text_embeds": torch.randn(2, text),
        "time_ids": torch.randint(0, 1024, (2, numbers)).float(),
    }
    return {**conditional(config), "added_cond_kwargs": added}


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
MODELS: dict[str, Case] = {
    "ldm-celebahq": (UNet2DModel, NARROW_2D, unconditional),
    "ldm-super-resolution": (
        UNet2DModel,
        narrow(SUPER_RESOLUTION, [8, 16, 16, 24], attention_head_dim=8),
        unconditional,
    ),
    "ldm-text2im": (UNet2DConditionModel, {**NARROW_SD, "cross_attention_dim": 20}, conditional),
    "sd-1": (UNet2DConditionModel, NARROW_SD, conditional),
    "sd-2": (
        UNet2DConditionModel,
        narrow(SD_2, [8, 16, 16, 16], cross_attention_dim=12, attention_head_dim=[1, 2, 4, 4]),
        conditional,
    ),
    "sdxl-base": (UNet2DConditionModel, NARROW_SDXL, with_text_and_sizes),
    "sdxl-refiner": (
        UNet2DConditionModel,
        narrow(
            SDXL_REFINER,
            [8, 16, 24, 24],
            cross_attention_dim=12,
            attention_head_dim=[1, 2, 4, 4],
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=5 * 6 + 10,
        ),
        with_text_and_sizes,
    ),
    "upscaler": (
        UNet2DConditionModel,
        narrow(UPSCALER, [8, 16, 16, 24], cross_attention_dim=12),
        with_context_and_classes,
    ),
    "inpainting": (UNet2DConditionModel, {**NARROW_SD, "in_channels": 9}, conditional),
}
CALLS: dict[str, Case] = {
    "odd size": (UNet2DConditionModel, NARROW_SD, of_odd_size),
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
    **MODELS,
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


def copied(value: Any) -> Any:
    """Inputs of its own for each model: floating ones ask for gradients, lists may be emptied."""
    if isinstance(value, Tensor):
        value = value.clone()
        return value.requires_grad_() if value.is_floating_point() else value
    if isinstance(value, list):
        return [copied(entry) for entry in value]
    if isinstance(value, dict):
        return {name: copied(entry) for name, entry in value.items()}
    return value


def gradients(model: torch.nn.Module, inputs: dict[str, Any], upstream: Tensor | None) -> Any:
    """Output, upstream gradient, and the gradient of each parameter and of the sample."""
    inputs = copied(inputs)
    tracked = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tracked |= {
        name: v for name, v in inputs.items() if name in ("sample", "encoder_hidden_states")
    }
    output = model(**inputs).sample
    upstream = torch.randn_like(output) if upstream is None else upstream
    values = torch.autograd.grad(output, list(tracked.values()), upstream, allow_unused=True)
    return output.detach(), upstream, dict(zip(tracked, values, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_diffusers(name: str, tmp_path: Any) -> None:
    ours_class, config, make_inputs = CASES[name]
    theirs_class = getattr(diffusers, ours_class.__name__)
    torch.manual_seed(sum(map(ord, name)))
    theirs = theirs_class(**config).eval()
    inputs = make_inputs(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ours_class.from_pretrained(tmp_path / "theirs")

    expected, upstream, expected_gradients = gradients(theirs, inputs, None)
    actual, _, actual_gradients = gradients(ours, inputs, upstream)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    largest = max(g.abs().max() for g in expected_gradients.values() if g is not None)
    assert set(actual_gradients) == set(expected_gradients)
    for key, gradient in expected_gradients.items():
        if gradient is None:
            assert actual_gradients[key] is None, key
            continue
        error = (actual_gradients[key] - gradient).abs().max()
        # Some gradients (of a key's bias) are zero but for rounding.
        assert error <= 1e-4 * max(gradient.abs().max(), 1e-3 * largest), key

    ours.save_pretrained(tmp_path / "ours")
    back = theirs_class.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(back(**copied(inputs)).sample, expected)
