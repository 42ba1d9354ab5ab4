"""``fastldm train-autoencoder``."""

from __future__ import annotations

from collections.abc import Sequence

from fastldm.cli import is_main_process
from fastldm.cli.parsing import parse_config
from fastldm.training.config import AutoencoderTrainingConfig


def run(arguments: Sequence[str]) -> None:
    """Train a first stage."""
    config = parse_config(
        AutoencoderTrainingConfig, arguments, "train-autoencoder", "Train a first stage on images."
    )
    from fastldm.training.autoencoder import train_autoencoder

    folder = train_autoencoder(config)
    if is_main_process():
        print(folder)
