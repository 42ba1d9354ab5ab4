"""Stable Diffusion's files: full-size names, and diffusers' own converters on the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from fastldm import AutoencoderKL, DDIMScheduler, LatentDiffusion, UNet2DConditionModel
from fastldm.checkpoints import compvis_state_dict, read_tensors, write_single_file
from fastldm.checkpoints.conditioner_keys import clip_prefix
from fastldm.errors import ConfigError
from fastldm.modules.attention import Attention
from tests.checkpoints.test_conditioners import open_clip

CONFIGS = json.loads(
    Path(__file__).parents[1].joinpath("golden", "diffusers_configs.json").read_text()
)
UNETS = [
    name.removesuffix("/unet")
    for name, config in CONFIGS.items()
    if name.startswith(("stable-diffusion-", "instruct")) and name.endswith("/unet")
]
FIELDS = (
    "in_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
    "num_class_embeds",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)


def heads(unet: UNet2DConditionModel) -> dict[str, int]:
    return {name: part.heads for name, part in unet.named_modules() if isinstance(part, Attention)}


@pytest.mark.parametrize("name", UNETS)
def test_unets_at_full_size_are_what_diffusers_converts_them_to(name: str) -> None:
    config = CONFIGS[f"{name}/unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    tensors = compvis_state_dict(unet)
    converted = theirs.convert_ldm_unet_checkpoint(dict(tensors), {**unet.config})
    own = {leaf: tensor.shape for leaf, tensor in unet.state_dict().items()}
    assert {leaf: tensor.shape for leaf, tensor in converted.items()} == own
    inferred = UNet2DConditionModel.from_single_file(tensors)
    assert {leaf: tensor.shape for leaf, tensor in inferred.state_dict().items()} == own
    assert heads(inferred) == heads(unet)
    assert all(inferred.config[field] == unet.config[field] for field in FIELDS)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


SMALL: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 64,
    "sample_size": 8,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_linear_projection": True, "attention_head_dim": [1, 2]},
        {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
        {"num_class_embeds": 5, "only_cross_attention": [True, False]},
    ],
)
def test_unets_have_the_weights_that_diffusers_converts(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**SMALL, **changes})
    tensors = compvis_state_dict(unet)
    assert same(theirs.convert_ldm_unet_checkpoint(dict(tensors), unet.config), unet.state_dict())
    given = {"attention_head_dim": unet.config["attention_head_dim"]}
    again = UNet2DConditionModel.from_single_file(tensors, **given)
    assert same(again.state_dict(), unet.state_dict())
    assert heads(again) == heads(unet)


def make_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
    )


def test_autoencoders_have_the_weights_that_diffusers_converts() -> None:
    vae = make_vae()
    tensors = compvis_state_dict(vae, prefix="first_stage_model.")
    converted = theirs.convert_ldm_vae_checkpoint(dict(tensors), vae.config)
    own = vae.state_dict()
    # diffusers leaves the trailing dimensions of attention as they are, or not, by name.
    assert converted.keys() == own.keys()
    assert all(
        torch.equal(value.reshape(own[key].shape), own[key]) for key, value in converted.items()
    )
    assert same(AutoencoderKL.from_single_file(tensors).state_dict(), own)


def make_clip(**fields: Any) -> CLIPTextModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 13,
        "max_position_embeddings": 9,
    }
    return CLIPTextModel(CLIPTextConfig(**sizes, **fields)).eval()


def v1_config(cond_stage: str, **params: Any) -> dict[str, Any]:
    """As of v1-inference.yaml and v2-inference.yaml, with sizes of their own."""
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return {
        "model": {
            "base_learning_rate": 1.0e-4,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": 1000,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": 8,
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "monitor": "val/loss_simple_ema",
                "scale_factor": 0.18215,
                "use_ema": False,
                "unet_config": {
                    "target": target,
                    "params": {
                        "use_checkpoint": True,
                        "image_size": 32,
                        "in_channels": 4,
                        "out_channels": 4,
                        "model_channels": 32,
                        "attention_resolutions": [1],
                        "num_res_blocks": 2,
                        "channel_mult": [1, 2],
                        "num_heads": 8,
                        "use_spatial_transformer": True,
                        "transformer_depth": 1,
                        "context_dim": 128,
                        "legacy": False,
                    },
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "monitor": "val/rec_loss",
                        "ddconfig": {
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
                "cond_stage_config": {"target": f"ldm.modules.encoders.modules.{cond_stage}"},
                **params,
            },
        }
    }


def whole_file(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**{**SMALL, "cross_attention_dim": 128})
    return {
        **compvis_state_dict(unet),
        **compvis_state_dict(make_vae(), prefix="first_stage_model."),
        **{f"cond_stage_model.{name}": tensor for name, tensor in condition.items()},
    }


def test_stable_diffusion_1_in_one_file(tmp_path: Path) -> None:
    clip = make_clip(hidden_act="quick_gelu")
    prefix = clip_prefix(clip)
    condition = {
        f"transformer.text_model.{name.removeprefix(prefix)}": tensor
        for name, tensor in clip.state_dict().items()
    }
    condition["transformer.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    tensors = whole_file(condition)
    path = tmp_path / "sd.safetensors"
    write_single_file(tensors, path)
    model = LatentDiffusion.from_single_file(path, config=v1_config("FrozenCLIPEmbedder"))
    assert model.unet.config["sample_size"] == 8
    assert model.latent_scale.factor == 0.18215
    assert not model.train_conditioner
    assert not model.use_attention_mask
    assert same(model.conditioner.state_dict(), clip.state_dict())
    model.save_single_file(tmp_path / "back.safetensors", config_path=tmp_path / "back.yaml")
    written = read_tensors(tmp_path / "back.safetensors")
    assert same({name: value for name, value in written.items() if "." in name}, tensors)
    again = LatentDiffusion.from_single_file(
        tmp_path / "back.safetensors", config=tmp_path / "back.yaml"
    )
    assert same(again.state_dict(), model.state_dict())
    stripped = theirs.convert_ldm_clip_checkpoint(tensors)
    own = {f"text_model.{name.removeprefix(prefix)}": v for name, v in clip.state_dict().items()}
    assert same({name: v for name, v in stripped.items() if "position_ids" not in name}, own)


def test_stable_diffusion_2_in_one_file(tmp_path: Path) -> None:
    clip = make_clip(hidden_act="gelu")
    tensors = whole_file(open_clip(clip))
    config = v1_config("x", parameterization="v")
    config["model"]["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    }
    model = LatentDiffusion.from_single_file(tensors, config=config)
    assert model.objective.prediction_type == "v_prediction"
    assert model.conditioner.config.num_hidden_layers == 2
    prefix = clip_prefix(clip)
    converted = theirs.convert_open_clip_checkpoint(clip, tensors)
    for name, tensor in model.conditioner.state_dict().items():
        assert torch.equal(tensor, converted[f"text_model.{name.removeprefix(prefix)}"])
    model.save_single_file(tmp_path / "back.ckpt")
    written = read_tensors(tmp_path / "back.ckpt")
    assert same({name: value for name, value in written.items() if "." in name}, tensors)


def test_what_a_file_does_not_say_is_asked_for() -> None:
    tensors = whole_file(open_clip(make_clip(hidden_act="gelu")))
    unet = UNet2DConditionModel.from_single_file(tensors, attention_head_dim=8)
    with pytest.raises(ConfigError, match="ε or v"):
        LatentDiffusion.from_single_file(tensors, unet=unet)
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    model = LatentDiffusion.from_single_file(tensors, unet=unet, scheduler=scheduler)
    assert model.objective.prediction_type == "v_prediction"
    assert model.unet is unet
