"""The published configs of the LDM family: complete, with diffusers' keys, shapes and numbers.

``tests/golden/diffusers_configs.json`` holds the fields of each repository's ``config.json``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import fastldm

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusers_configs.json"
CONFIGS: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
CLASSES = ("AutoencoderKL", "UNet2DConditionModel", "UNet2DModel", "VQModel")
# A published model that has none of its own differs from these in fields that the test names.
NARROW = [1, 2, 3, 4]


def class_of(config: dict[str, Any]) -> type[Any]:
    return getattr(fastldm, config["_class_name"])


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_taken_and_no_key_or_shape_differs_from_diffusers(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        ours = class_of(config).from_config(config)
        theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    assert {field: ours.config.get(field) for field in config if field[0] != "_"} == {
        field: value for field, value in config.items() if field[0] != "_"
    }
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_the_fields_are_diffusers_fields_and_the_extensions(name: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(library, name).__init__).parameters
        for library in (fastldm, diffusers)
    )
    extensions = getattr(fastldm, name).extension_fields
    assert set(ours) - set(theirs) == extensions
    assert set(theirs) <= set(ours)
    for field in set(theirs) - {"self"}:
        expected, actual = theirs[field].default, ours[field].default
        if field == "mid_block_only_cross_attention":
            continue
        assert actual == expected or (actual, expected) in ((False, None), (None, False)), field


def shortened(depths: int | list[int]) -> int | list[int]:
    """Fewer transformer layers, still one or several, and another number where a level has one."""
    if isinstance(depths, int):
        return min(depths, 2)
    ranks = sorted(set(depths))
    return [ranks.index(depth) + 1 for depth in depths]


def narrowed(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with few channels and transformer layers."""
    widths = sorted(set(config["block_out_channels"]))
    channels = [8 * NARROW[widths.index(width)] for width in config["block_out_channels"]]
    changes: dict[str, Any] = {"block_out_channels": channels, "norm_num_groups": 4}
    if config.get("norm_type") == "spatial":  # whose groups are always 32
        changes["block_out_channels"] = [4 * width for width in channels]
    if "num_vq_embeddings" in config:
        changes["num_vq_embeddings"] = 24
    heads = config.get("attention_head_dim")
    if config["_class_name"] == "UNet2DModel":
        changes["attention_head_dim"] = 8
    elif isinstance(heads, list):
        changes["attention_head_dim"] = [1, 2, 4, 4][: len(heads)]
    if "cross_attention_dim" in config:
        changes["cross_attention_dim"] = 12
    if "transformer_layers_per_block" in config:
        changes["transformer_layers_per_block"] = shortened(config["transformer_layers_per_block"])
    if config.get("addition_embed_type"):
        numbers = 6 if len(channels) == 3 else 5
        changes["addition_time_embed_dim"] = 6
        changes["projection_class_embeddings_input_dim"] = 6 * numbers + 10
    return {**config, **changes}


def inputs_of(config: dict[str, Any]) -> dict[str, Any]:
    side = 2 ** len(config["block_out_channels"])
    sample = torch.randn(2, config["in_channels"], side, side)
    if "UNet" not in config["_class_name"]:
        return {"sample": sample}
    inputs: dict[str, Any] = {"sample": sample, "timestep": torch.tensor([7, 901])}
    if "cross_attention_dim" in config:
        inputs["encoder_hidden_states"] = torch.randn(2, 5, config["cross_attention_dim"])
    if config.get("num_class_embeds"):
        inputs["class_labels"] = torch.tensor([20, 350])
    if config.get("addition_embed_type"):
        features = config["projection_class_embeddings_input_dim"] - 10
        sizes = torch.randint(0, 1024, (2, features // 6)).float()
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 10), "time_ids": sizes}
    return inputs


def of_unet(model: nn.Module, **inputs: Any) -> tuple[Tensor, ...]:
    return (model(**inputs).sample,)


def of_kl(model: Any, sample: Tensor) -> tuple[Tensor, ...]:
    posterior = model.encode(sample).latent_dist
    return posterior.parameters, model.decode(posterior.mode()).sample


def of_vq(model: Any, sample: Tensor) -> tuple[Tensor, ...]:
    decoded = model(sample)
    return model.encode(sample).latents, decoded.sample, decoded.commit_loss


FORWARDS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"AutoencoderKL": of_kl, "VQModel": of_vq}
# Configs that differ from another one only in names and numbers that the forward pass ignores.
ALIKE = {
    "ldm-super-resolution-4x-openimages/vqvae",
    "ldm-text2im-large-256/vqvae",
    "sd-image-variations-diffusers/unet",
    "sdxl-vae-fp16-fix",
    "stable-diffusion-2-1-base/unet",
    "stable-diffusion-xl-base-1.0/vae",
}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ALIKE])
def test_outputs_and_gradients_are_those_of_diffusers_in_both_directions(
    name: str, compare_with_diffusers: Callable[..., None]
) -> None:
    config = narrowed(CONFIGS[name])
    forward = FORWARDS.get(config["_class_name"], of_unet)
    compare_with_diffusers(class_of(config), config, inputs_of(config), forward)
