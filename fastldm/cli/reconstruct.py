"""``fastldm reconstruct``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastldm.cli.common import default_device, save_image, write_errors
from fastldm.cli.parsing import parse_config
from fastldm.data.config import DataConfig
from fastldm.errors import ConfigError


@dataclass(kw_only=True)
class ReconstructConfig:
    """Which images to reconstruct with which autoencoder."""

    model: str
    """Folder of an autoencoder, or of a latent diffusion model, whose first stage is used."""
    data: DataConfig
    """The images."""
    split: Literal["train", "test"] = "train"
    """Which of them: ``train`` or the held-out ones."""
    output_dir: str = "reconstructions"
    """Folder for the reconstructions and ``grid.png``, originals beside them."""
    num_images: int = 64
    """How many at most, spread over the data."""
    batch_size: int = 16
    """Images at once."""
    tiling: bool = False
    """Encode and decode in tiles, for large images."""
    cpu: bool = False
    """Stay on the CPU although there is an accelerator."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


def run(arguments: Sequence[str]) -> None:
    """Write reconstructions and print their PSNR."""
    config = parse_config(
        ReconstructConfig, arguments, "reconstruct", "Encode and decode images with a first stage."
    )
    import torch

    from fastldm.data import save_image_grid
    from fastldm.metrics import psnr
    from fastldm.training.latent_source import check_resolution
    from fastldm.training.registry import load_first_stage
    from fastldm.training.validation import fixed_items

    device = default_device(config.cpu)
    model = load_first_stage(config.model, "model").to(device)
    check_resolution(config.data, model)
    if config.tiling:
        model.enable_tiling()
    batch = fixed_items(config.data, config.num_images, config.split)
    images = batch["pixel_values"]
    with torch.no_grad():
        parts = [
            model(part.to(device)).sample.float().clamp(-1.0, 1.0).cpu()
            for part in images.split(config.batch_size)
        ]
    reconstructions = torch.cat(parts)
    output_dir = Path(config.output_dir)
    with write_errors(config.output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(reconstructions):
            save_image(image, output_dir / f"{number:05}.png")
        pairs = torch.stack([images, reconstructions], dim=1).flatten(0, 1)
        save_image_grid(pairs, output_dir / "grid.png", columns=8)
    print(f"{output_dir}: {len(images)} images, PSNR {psnr(images, reconstructions).mean():.2f} dB")
