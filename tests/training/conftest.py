"""A tiny folder of images with captions and classes, and tiny configurations of both trainers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastldm.data import DataConfig
from fastldm.losses import FirstStageLossConfig
from fastldm.training import (
    AutoencoderTrainingConfig,
    LatentDiffusionTrainingConfig,
    ModelConfig,
    train_autoencoder,
)
from fastldm.training.config import SamplingConfig, TokenizerConfig

SIDE = 16
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}

AutoencoderConfig = Callable[..., AutoencoderTrainingConfig]
DiffusionConfig = Callable[..., LatentDiffusionTrainingConfig]


def model_settings(kind: str, **fields: Any) -> ModelConfig:
    """A first stage of two narrow levels, f = 2."""
    settings: dict[str, Any] = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "mid_block_add_attention": False,
        **fields,
    }
    return ModelConfig(kind, settings)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 discs in three colours, one a subfolder, with captions."""
    folder = tmp_path_factory.mktemp("discs")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    lines = []
    for number in range(24):
        name, colour = list(COLOURS.items())[number % 3]
        centre, radius = random.uniform(5, 11, 2), random.uniform(2, 5)
        inside = np.hypot(rows - centre[0], columns - centre[1]) < radius
        pixels = np.where(inside[..., None], colour, 255).astype(np.uint8)
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
        size = "small" if radius < 3.5 else "large"
        entry = {"file_name": f"{name}/{number:02}.png", "text": f"a {size} {name} disc"}
        lines.append(json.dumps(entry))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def data(images: Path) -> Callable[..., DataConfig]:
    """Data configurations of those images, one in four held out."""

    def make(**fields: Any) -> DataConfig:
        defaults = {"source": str(images), "resolution": SIDE, "holdout_fraction": 0.25}
        return DataConfig(**{**defaults, **fields})

    return make


@pytest.fixture
def autoencoder_config(data: Callable[..., DataConfig], tmp_path: Path) -> AutoencoderConfig:
    """Training of a tiny KL autoencoder against a tiny discriminator, nothing drawn on the way."""

    def make(name: str = "autoencoder", **fields: Any) -> AutoencoderTrainingConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "data": data(),
            "model": model_settings("AutoencoderKL"),
            "loss": FirstStageLossConfig(perceptual_weight=0.0, discriminator_start=0),
            "discriminator": ModelConfig(
                "PatchDiscriminator",
                {"base_channels": 4, "num_layers": 1, "normalization": "group"},
            ),
            "batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "sample_every": 0,
            "validate_every": 0,
            "checkpoint_every": 0,
            "sample_images": 4,
            "validation_images": 4,
            "tensorboard": False,
            "progress_bar": False,
            "cpu": True,
        }
        return AutoencoderTrainingConfig(**{**defaults, **fields})

    return make


@pytest.fixture(scope="session")
def first_stage(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny trained KL autoencoder."""
    config = AutoencoderTrainingConfig(
        output_dir=str(tmp_path_factory.mktemp("first_stage")),
        data=DataConfig(source=str(images), resolution=SIDE, holdout_fraction=0.25),
        model=model_settings("AutoencoderKL"),
        loss=FirstStageLossConfig(perceptual_weight=0.0, discriminator_weight=0.0),
        max_steps=5,
        learning_rate=1e-3,
        tensorboard=False,
        progress_bar=False,
        cpu=True,
    )
    return train_autoencoder(config)


@pytest.fixture
def diffusion_config(
    data: Callable[..., DataConfig], first_stage: Path, tmp_path: Path
) -> DiffusionConfig:
    """Training of a tiny unconditional model, or with ``conditioning="crossattn"`` on captions."""

    def make(name: str = "diffusion", **fields: Any) -> LatentDiffusionTrainingConfig:
        cross = fields.get("conditioning", "none") != "none"
        kind = "CrossAttn" if cross else ""
        unet = {
            "block_out_channels": [8, 8],
            "down_block_types": ["DownBlock2D", f"{kind}DownBlock2D"],
            "up_block_types": [f"{kind}UpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "first_stage": str(first_stage),
            "data": data(),
            "unet": ModelConfig("UNet2DModel", {**unet, "add_attention": False}),
            "batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
            "sample_every": 0,
            "validate_every": 0,
            "checkpoint_every": 0,
            "sample_images": 4,
            "validation_images": 4,
            "tensorboard": False,
            "progress_bar": False,
            "cpu": True,
            "sampling": SamplingConfig(num_inference_steps=2),
        }
        if cross:
            defaults["unet"] = ModelConfig(
                "UNet2DConditionModel", {**unet, "num_attention_heads": 2}
            )
            defaults["conditioning_dropout"] = 0.2
        if fields.get("conditioning") == "crossattn":
            text = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "head_dim": 4}
            defaults["conditioner"] = ModelConfig("TextEncoder", {**text, "max_length": 8})
            defaults["tokenizer"] = TokenizerConfig(vocab_size=40)
        if fields.get("conditioning") == "class":
            defaults["conditioner"] = ModelConfig("ClassEmbedder", {"hidden_size": 8})
        return LatentDiffusionTrainingConfig(**{**defaults, **fields})

    return make


@pytest.fixture
def metrics() -> Callable[[str | Path], list[dict[str, Any]]]:
    """The lines of ``metrics.jsonl`` in an output folder."""

    def read(output_dir: str | Path) -> list[dict[str, Any]]:
        text = Path(output_dir, "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return read
