"""Run by torchrun: trains the stages whose configurations a JSON file holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastldm.data import DataConfig
from fastldm.losses import DiffusionLossConfig, FirstStageLossConfig
from fastldm.training import (
    AutoencoderTrainingConfig,
    LatentDiffusionTrainingConfig,
    ModelConfig,
    train_autoencoder,
    train_latent_diffusion,
)
from fastldm.training.config import SamplingConfig, TokenizerConfig

AUTOENCODER_FIELDS: dict[str, Any] = {
    "data": DataConfig,
    "loss": FirstStageLossConfig,
    "model": ModelConfig,
    "discriminator": ModelConfig,
}
DIFFUSION_FIELDS: dict[str, Any] = {
    "data": DataConfig,
    "loss": DiffusionLossConfig,
    "unet": ModelConfig,
    "scheduler": ModelConfig,
    "conditioner": ModelConfig,
    "tokenizer": TokenizerConfig,
    "sampling": SamplingConfig,
}


def main(path: str) -> None:
    """Train the stages."""
    stages = json.loads(Path(path).read_text())
    if "autoencoder" in stages:
        fields = _build(stages["autoencoder"], AUTOENCODER_FIELDS)
        train_autoencoder(AutoencoderTrainingConfig(**fields))
    if "diffusion" in stages:
        fields = _build(stages["diffusion"], DIFFUSION_FIELDS)
        train_latent_diffusion(LatentDiffusionTrainingConfig(**fields))


def _build(plain: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    return {name: kinds[name](**value) if name in kinds else value for name, value in plain.items()}


if __name__ == "__main__":
    main(sys.argv[1])
