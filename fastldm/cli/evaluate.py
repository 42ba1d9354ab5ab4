"""``fastldm evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastldm.cli.common import default_device, is_latent_diffusion, write_errors
from fastldm.cli.parsing import parse_config
from fastldm.data.config import DataConfig
from fastldm.errors import ConfigError
from fastldm.storage import write_json


@dataclass(kw_only=True)
class EvaluateConfig:
    """What to measure.

    Reconstructions are always measured by PSNR and SSIM, and a VQ model by its codebook's usage.
    """

    model: str
    """Folder of an autoencoder or of a latent diffusion model."""
    data: DataConfig
    """Images to measure on."""
    split: Literal["train", "test"] = "test"
    """Which of them: ``train`` or the held-out ones."""
    num_images: int | None = None
    """Only the first so many."""
    batch_size: int = 16
    """Images at once."""
    lpips: bool = False
    """Measure LPIPS."""
    lpips_net: Literal["alex", "vgg", "squeeze"] = "alex"
    """LPIPS's backbone."""
    lpips_weights: str | None = None
    """Local file of the backbone's torchvision weights; else downloaded."""
    rfid: bool = False
    """Measure the Fréchet Inception distance of reconstructions."""
    fid_samples: int = 0
    """Draw so many samples of a latent diffusion model and measure their FID to the data."""
    inception_weights: str | None = None
    """Local file of torch-fidelity's Inception weights; else downloaded."""
    num_inference_steps: int = 50
    """Steps of the sampler, for the FID."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, for the FID."""
    eta: float = 0.0
    """η of DDIM, for the FID."""
    seed: int = 0
    """Seed of the first sample, for the FID."""
    output: str | None = None
    """JSON file for the figures, which are printed, too."""
    cpu: bool = False
    """Stay on the CPU although there is an accelerator."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.num_images is not None and self.num_images < 1:
            raise ConfigError(f"num_images: expected at least 1, got {self.num_images}")


def run(arguments: Sequence[str]) -> None:
    """Measure and print a JSON object."""
    config = parse_config(
        EvaluateConfig, arguments, "evaluate", "Measure a model on images; prints a JSON object."
    )
    if config.fid_samples and Path(config.model).is_dir() and not is_latent_diffusion(config.model):
        raise ConfigError(f"fid_samples: {config.model} holds only a first stage")
    figures = _measure_reconstructions(config)
    if config.fid_samples:
        figures["fid"] = _measure_samples(config)
    print(json.dumps(figures, indent=2))
    if config.output is not None:
        with write_errors(config.output):
            write_json(Path(config.output), figures)


def _batches(config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    from fastldm.data import build_dataloader, load_images

    dataset = load_images(config.data, split=config.split, augment=False)
    loader = build_dataloader(
        config.data, dataset, config.batch_size, shuffle=False, drop_last=False
    )
    left = config.num_images
    for batch in loader:
        if left is not None:
            batch = {name: values[:left] for name, values in batch.items()}
            left -= len(batch["pixel_values"])
        yield batch
        if left == 0:
            return


def _measure_reconstructions(config: EvaluateConfig) -> dict[str, float]:
    import torch

    from fastldm.metrics import LPIPS, FrechetInceptionDistance, ReconstructionMetrics
    from fastldm.models import VQModel
    from fastldm.training.latent_source import check_resolution
    from fastldm.training.registry import load_first_stage

    device = default_device(config.cpu)
    model = load_first_stage(config.model, "model").to(device)
    check_resolution(config.data, model)
    is_vq = isinstance(model, VQModel)
    metrics = ReconstructionMetrics(
        lpips=LPIPS(config.lpips_net, config.lpips_weights) if config.lpips else None,
        fid=FrechetInceptionDistance(config.inception_weights, device=device)
        if config.rfid
        else None,
        codebook_size=model.config["num_vq_embeddings"] if is_vq else None,
    )
    for batch in _batches(config):
        images = batch["pixel_values"].to(device)
        with torch.no_grad():
            indices = model.quantize(model.encode(images).latents).indices if is_vq else None
            metrics.update(images, model(images).sample.float(), indices)
    return metrics.compute()


def _measure_samples(config: EvaluateConfig) -> float:
    from fastldm.latent_diffusion import LatentDiffusion
    from fastldm.metrics import FrechetInceptionDistance

    device = default_device(config.cpu)
    distance = FrechetInceptionDistance(config.inception_weights, device=device)
    model = LatentDiffusion.from_pretrained(config.model).to(device)
    drawn = 0
    while drawn < config.fid_samples:
        for batch in _batches(config):
            count = min(len(batch["pixel_values"]), config.fid_samples - drawn)
            if count == 0:
                break
            images = model.sample(
                count,
                conditioning=_condition(model, batch, count),
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                eta=config.eta,
                seeds=config.seed + drawn,
                size=(config.data.resolution, config.data.resolution),
            )
            distance.update(images)
            drawn += count
    for batch in _batches(config):
        distance.update_reference(batch["pixel_values"])
    return distance.compute()


def _condition(model: Any, batch: dict[str, Any], count: int) -> Any:
    if model.conditioning == "none":
        return None
    name = "caption" if model.tokenizer is not None else "class_label"
    if name not in batch:
        raise ConfigError(f"fid_samples: the model is conditioned on a {name}, the data has none")
    return batch[name][:count]
