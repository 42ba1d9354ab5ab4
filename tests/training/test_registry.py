"""Only fastldm's own classes are built from a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastldm.errors import CheckpointError, ConfigError
from fastldm.losses import DiffusionLoss, DiffusionLossConfig
from fastldm.models import AutoencoderKL, VQModel
from fastldm.schedulers import SchedulerMixin
from fastldm.training import ModelConfig
from fastldm.training.registry import (
    CONDITIONERS,
    DISCRIMINATORS,
    FIRST_STAGES,
    SCHEDULERS,
    UNETS,
    build,
    load_first_stage,
    resolve_class,
)


def test_every_name_is_a_class() -> None:
    for names in (FIRST_STAGES, DISCRIMINATORS, UNETS, CONDITIONERS, SCHEDULERS):
        for name in names:
            assert resolve_class(name, names, "part").__name__ == name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_is_trained_on_every_scheduler(name: str) -> None:
    """They are all that the library has; the loss needs ᾱ and the prediction type."""
    assert set(SCHEDULERS) == set(SchedulerMixin._compatibles)
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    scheduler = build(ModelConfig(name, config), SCHEDULERS, "scheduler")
    loss = DiffusionLoss(
        DiffusionLossConfig(), scheduler.alphas_cumprod, scheduler.config.prediction_type
    )
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([3, 900])
    expected = scheduler.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(loss.target(x0, noise, timesteps), expected)


@pytest.mark.parametrize("name", ["os.system", "torch.nn.Linear", "UNet2DModel", ""])
def test_other_classes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model.class_name: expected one of AutoencoderKL"):
        build(ModelConfig(name), FIRST_STAGES, "model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"latent_chanels": 4},
            r"model.config: .* no config field 'latent_chanels'",
        ),
        ({"latent_channels": "four"}, r"model.config.latent_channels: expected int, got 'four'"),
        ({"latent_channels": True}, r"model.config.latent_channels: expected int, got True"),
        ({"block_out_channels": 32}, r"block_out_channels: expected list\[int\], got 32"),
        ({"block_out_channels": [32, "a"]}, r"block_out_channels: expected list\[int\], got \[32,"),
        ({"scaling_factor": "1e-3"}, r"scaling_factor: expected float, got '1e-3'"),
        ({"latents_mean": 3}, r"latents_mean: expected list\[float\] | None, got 3"),
    ],
)
def test_wrong_fields_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ModelConfig("AutoencoderKL", dict(config)), FIRST_STAGES, "model")


def test_pretrained_weights_are_taken(tmp_path: Path) -> None:
    model = VQModel(block_out_channels=(32,), num_vq_embeddings=8)
    model.save_pretrained(tmp_path)
    loaded = build(ModelConfig("VQModel", pretrained=str(tmp_path)), FIRST_STAGES, "model")
    assert bool((loaded.quantize.embedding.weight == model.quantize.embedding.weight).all())
    assert isinstance(load_first_stage(tmp_path), VQModel)


def test_the_first_stage_of_a_latent_diffusion_model(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert isinstance(load_first_stage(tmp_path), AutoencoderKL)


def test_a_folder_without_a_first_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model: .*gone: no such folder"):
        load_first_stage(tmp_path / "gone", "model")
    with pytest.raises(CheckpointError, match=r"first_stage: .*no config.json in it$"):
        load_first_stage(tmp_path)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"its model is in .*final$"):
        load_first_stage(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match="VQModel or IdentityFirstStage, got 'UNet2DModel'"):
        load_first_stage(tmp_path)
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_first_stage(tmp_path)
