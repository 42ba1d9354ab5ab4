"""``fastldm train-ldm``."""

from __future__ import annotations

from collections.abc import Sequence

from fastldm.cli import is_main_process
from fastldm.cli.parsing import parse_config
from fastldm.training.config import LatentDiffusionTrainingConfig


def run(arguments: Sequence[str]) -> None:
    """Train a second stage."""
    config = parse_config(
        LatentDiffusionTrainingConfig,
        arguments,
        "train-ldm",
        "Train a diffusion model on the latents of a first stage.",
    )
    from fastldm.training.latent_diffusion import train_latent_diffusion

    folder = train_latent_diffusion(config)
    if is_main_process():
        print(folder)
