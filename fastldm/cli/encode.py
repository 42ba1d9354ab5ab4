"""``fastldm encode``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastldm.cli.common import default_device, write_errors
from fastldm.cli.parsing import parse_config
from fastldm.data.config import DataConfig


@dataclass(kw_only=True)
class EncodeConfig:
    """Which images to encode with which autoencoder."""

    first_stage: str
    """Folder of the trained autoencoder."""
    data: DataConfig
    """The images; give ``train-ldm`` the same."""
    output_dir: str
    """Folder of the latent cache."""
    split: Literal["train", "test"] = "train"
    """Which of them: ``train`` or the held-out ones."""
    batch_size: int = 16
    """Images encoded at once."""
    flips: bool = False
    """Encode every image mirrored, too."""
    shard_size: int = 4096
    """Images a file, rounded up to whole batches."""
    cpu: bool = False
    """Stay on the CPU although there is an accelerator."""


def run(arguments: Sequence[str]) -> None:
    """Make a latent cache."""
    config = parse_config(
        EncodeConfig, arguments, "encode", "Encode images with a first stage into a latent cache."
    )
    from fastldm.training.latent_cache import encode_dataset
    from fastldm.training.latent_source import check_resolution
    from fastldm.training.registry import load_first_stage

    first_stage = load_first_stage(config.first_stage)
    check_resolution(config.data, first_stage)
    with write_errors(config.output_dir):
        folder = encode_dataset(
            first_stage,
            config.data,
            config.output_dir,
            split=config.split,
            batch_size=config.batch_size,
            flips=config.flips,
            shard_size=config.shard_size,
            device=default_device(config.cpu),
        )
    print(folder)
