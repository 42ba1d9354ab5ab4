"""SDXL's single files, base and refiner: every part both ways, and diffusers' own converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fastldm import AutoencoderKL, LatentDiffusion, UNet2DConditionModel
from fastldm.checkpoints import (
    compvis_state_dict,
    load_text_encoders,
    read_tensors,
    sdxl_state_dict,
    write_single_file,
)
from fastldm.checkpoints.conditioner_keys import clip_prefix
from fastldm.errors import CheckpointError, ConfigError
from tests.checkpoints.test_stable_diffusion import make_clip, make_vae, same

WIDTHS = {"base": 2816, "refiner": 2560}
FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 13,
    "max_position_embeddings": 9,
    "projection_dim": 24,
    "hidden_act": "gelu",
    "eos_token_id": 2,
}
TOKENS = torch.tensor([[1, 2, 3, 12, 0], [4, 12, 0, 0, 0]])


def make_unet(kind: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=[32, 64],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2],
        cross_attention_dim=64,
        attention_head_dim=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=WIDTHS[kind],
        sample_size=128,
    )


def make_projected() -> CLIPTextModelWithProjection:
    torch.manual_seed(1)
    return CLIPTextModelWithProjection(CLIPTextConfig(**SIZES)).eval()


def open_clip(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """OpenCLIP's names, by its own conventions."""
    ours = {name.removeprefix("text_model."): v for name, v in model.state_dict().items()}
    tensors = {
        "model.token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "model.positional_embedding": ours["embeddings.position_embedding.weight"],
        "model.text_projection": ours["text_projection.weight"].T.contiguous(),
        "model.logit_scale": torch.tensor(1.0),
    }
    names = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for leaf in ("weight", "bias"):
        tensors[f"model.ln_final.{leaf}"] = ours[f"final_layer_norm.{leaf}"]
        for layer in range(SIZES["num_hidden_layers"]):
            here, there = f"model.transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            for name, own in names.items():
                tensors[f"{here}.{name}.{leaf}"] = ours[f"{there}.{own}.{leaf}"]
            tensors[f"{here}.attn.in_proj_{leaf}"] = torch.cat(
                [ours[f"{there}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            )
    return tensors


def clip_tensors() -> dict[str, Tensor]:
    clip = make_clip(hidden_act="quick_gelu")
    prefix = clip_prefix(clip)
    tensors = {
        f"transformer.text_model.{name.removeprefix(prefix)}": tensor
        for name, tensor in clip.state_dict().items()
    }
    return tensors | {"transformer.text_model.embeddings.position_ids": torch.arange(9)[None]}


def whole_file(kind: str) -> dict[str, Tensor]:
    encoders = [clip_tensors()] if kind == "base" else []
    encoders.append(open_clip(make_projected()))
    return {
        **compvis_state_dict(make_unet(kind)),
        **compvis_state_dict(make_vae(), prefix="first_stage_model."),
        **{
            f"conditioner.embedders.{number}.{name}": tensor
            for number, tensors in enumerate(encoders)
            for name, tensor in tensors.items()
        },
        "denoiser.sigmas": torch.linspace(0.03, 14.6, 1000),
    }


def engine(kind: str) -> dict[str, Any]:
    """As of sd_xl_base.yaml and sd_xl_refiner.yaml, with sizes of their own."""
    return {
        "model": {
            "target": "sgm.models.diffusion.DiffusionEngine",
            "params": {
                "scale_factor": 0.13025,
                "disable_first_stage_autocast": True,
                "denoiser_config": {"target": "sgm.modules.diffusionmodules.DiscreteDenoiser"},
                "network_config": {
                    "target": "sgm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "adm_in_channels": WIDTHS[kind],
                        "num_classes": "sequential",
                        "use_checkpoint": True,
                        "in_channels": 4,
                        "out_channels": 4,
                        "model_channels": 32,
                        "attention_resolutions": [2],
                        "num_res_blocks": 2,
                        "channel_mult": [1, 2],
                        "num_head_channels": 32,
                        "use_spatial_transformer": True,
                        "use_linear_in_transformer": True,
                        "transformer_depth": [1, 2],
                        "context_dim": 64 if kind == "base" else [64, 64],
                        "spatial_transformer_attn_type": "softmax-xformers",
                    },
                },
                "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {}},
                "first_stage_config": {
                    "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                    "params": {
                        "embed_dim": 4,
                        "monitor": "val/rec_loss",
                        "ddconfig": {
                            "attn_type": "vanilla-xformers",
                            "double_z": True,
                            "z_channels": 4,
                            "resolution": 256,
                            "in_channels": 3,
                            "out_ch": 3,
                            "ch": 32,
                            "ch_mult": [1, 2, 2],
                            "num_res_blocks": 2,
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
            },
        }
    }


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("stated", [True, False])
def test_unet_and_first_stage(kind: str, stated: bool) -> None:
    tensors, unet = whole_file(kind), make_unet(kind)
    config = engine(kind) if stated else None
    heads = {} if stated else {"attention_head_dim": [1, 2]}
    loaded = UNet2DConditionModel.from_single_file(tensors, config=config, **heads)
    assert same(loaded.state_dict(), unet.state_dict())
    for field in ("addition_embed_type", "addition_time_embed_dim", "sample_size"):
        assert loaded.config[field] == unet.config[field]
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": 5,
        "encoder_hidden_states": torch.randn(1, 3, 64),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, 1280),
            "time_ids": torch.randint(0, 1024, (1, 6 if kind == "base" else 5)),
        },
    }
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).sample, unet.eval()(**inputs).sample)
    vae = AutoencoderKL.from_single_file(tensors, config=config)
    assert same(vae.state_dict(), make_vae().state_dict())
    assert vae.config["scaling_factor"] == 0.13025


@torch.no_grad()
@pytest.mark.parametrize("kind", WIDTHS)
def test_text_encoders_give_transformers_numbers(kind: str) -> None:
    tensors = whole_file(kind)
    encoders = load_text_encoders(tensors)
    projected, prefix = make_projected(), SECOND if kind == "base" else FIRST
    second = encoders["text_encoder_2"]
    found, expected = (model(TOKENS, output_hidden_states=True) for model in (second, projected))
    assert torch.equal(found.text_embeds, expected.text_embeds)
    assert torch.equal(found.hidden_states[-2], expected.hidden_states[-2])
    converted = theirs.convert_open_clip_checkpoint(second, tensors, prefix=f"{prefix}model.")
    assert same(
        {name: tensor for name, tensor in converted.items() if "position_ids" not in name},
        second.state_dict(),
    )
    assert ("text_encoder" in encoders) == (kind == "base")
    if kind == "base":
        clip = make_clip(hidden_act="quick_gelu")
        assert torch.equal(
            encoders["text_encoder"](TOKENS).last_hidden_state, clip(TOKENS).last_hidden_state
        )


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_file_goes_through_bit_for_bit(kind: str, tmp_path: Path) -> None:
    tensors = whole_file(kind)
    write_single_file(tensors, tmp_path / "xl.safetensors")
    unet = UNet2DConditionModel.from_single_file(tmp_path / "xl.safetensors", config=engine(kind))
    vae = AutoencoderKL.from_single_file(tmp_path / "xl.safetensors", config=engine(kind))
    encoders = load_text_encoders(tmp_path / "xl.safetensors")
    write_single_file(sdxl_state_dict(unet, vae, encoders), tmp_path / "back.safetensors")
    left_out = ("position_ids", "logit_scale", "denoiser.sigmas")
    kept = {name: value for name, value in tensors.items() if not name.endswith(left_out)}
    assert same(read_tensors(tmp_path / "back.safetensors"), kept)
    half = load_text_encoders(tensors, torch_dtype=torch.float16)
    assert all(p.dtype == torch.float16 for one in half.values() for p in one.parameters())


def test_text_encoders_at_full_size() -> None:
    """OpenCLIP's bigG, whose parameters are counted from its widths."""
    width, inner, layers, words = 1280, 5120, 32, 49408
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(
            CLIPTextConfig(**sizes, num_attention_heads=20, projection_dim=width)
        )
        unet, vae = make_unet("refiner"), make_vae()
    tensors = sdxl_state_dict(unet, vae, {"text_encoder_2": model})
    (loaded,) = load_text_encoders(tensors).values()
    assert loaded.config.num_attention_heads == 20
    assert {name: v.shape for name, v in loaded.state_dict().items()} == {
        name: v.shape for name, v in model.state_dict().items()
    }
    block = 4 * width * (width + 1) + 2 * width * inner + width + inner + 4 * width
    total = (words + 77 + width + 2) * width + layers * block
    assert sum(parameter.numel() for parameter in loaded.parameters()) == total


def test_stable_diffusion_s_encoder_is_the_first() -> None:
    condition = {f"cond_stage_model.{name}": tensor for name, tensor in clip_tensors().items()}
    (name,) = load_text_encoders(condition)
    assert name == "text_encoder"


def test_what_cannot_be_is_refused() -> None:
    tensors = whole_file("base")
    with pytest.raises(ConfigError, match=r"SDXL's conditioner.*load_text_encoders"):
        LatentDiffusion.from_single_file(tensors)
    with pytest.raises(ConfigError, match="conditioner_config: LatentDiffusion has no such part"):
        LatentDiffusion.from_single_file(tensors, config=engine("base"))
    config = engine("refiner")
    config["model"]["params"]["network_config"]["params"]["context_dim"] = [64, 32]
    with pytest.raises(ConfigError, match="context_dim"):
        UNet2DConditionModel.from_single_file(tensors, config=config)
    config = engine("base")
    config["model"]["params"]["sampler"] = 1
    with pytest.raises(ConfigError, match="does not know 'sampler'"):
        AutoencoderKL.from_single_file(tensors, config=config)
    with pytest.raises(CheckpointError, match="holds no text encoder"):
        load_text_encoders(compvis_state_dict(make_vae()))
    with pytest.raises(CheckpointError, match=r"embedders\.1: no model\.text_projection"):
        del tensors[f"{SECOND}model.text_projection"]
        load_text_encoders(tensors)
    with pytest.raises(CheckpointError, match=r"embedders\.1: a second text_encoder"):
        first = {name: v for name, v in whole_file("refiner").items() if FIRST in name}
        load_text_encoders(first | {name.replace(FIRST, SECOND): v for name, v in first.items()})
    with pytest.raises(ConfigError, match="text_encoders: expected text_encoder_2"):
        sdxl_state_dict(make_unet("base"), make_vae(), {"text_encoder": make_clip()})
