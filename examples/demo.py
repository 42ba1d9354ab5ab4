"""The demo: both stages of latent diffusion on emoji, from nothing to captioned samples.

Runs the commands that a user would type, each of which goes on from where it was interrupted, then
measures the result: PSNR on held-out emoji, and how often a sample lies nearer to its own emoji
than to a random other one. On a CPU it trains at 32×32 in about 20 minutes; on a GPU at 64×64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from fastldm import LatentDiffusion
from fastldm.cli import main as fastldm
from fastldm.data import DataConfig, ImageDataset, load_images, save_image_grid
from fastldm.metrics import psnr
from fastldm.storage import write_json

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "demo"
CHECKED_CAPTIONS = 200
SHOWN_CAPTIONS = 32
BATCH = 50


def train(output: Path, variant: str, overrides: list[str]) -> LatentDiffusion:
    """Train both stages, or go on with what an earlier run began."""
    autoencoder, cache, diffusion = output / "autoencoder", output / "latents", output / "ldm"
    first_stage = str(autoencoder / "final")
    run(
        "train-autoencoder",
        f"autoencoder{variant}",
        f"--output_dir={autoencoder}",
        *overrides,
    )
    run(
        "train-ldm",
        f"ldm{variant}",
        f"--output_dir={diffusion}",
        f"--first_stage={first_stage}",
        f"--latent_cache={cache}",
        *overrides,
    )
    return LatentDiffusion.from_pretrained(diffusion / "final")


def run(command: str, config: str, *arguments: str) -> None:
    """One `fastldm` command, printed as a user would type it."""
    words = [command, f"--config={CONFIGS / config}.yaml", "--resume=latest", *arguments]
    print("\n$ fastldm", *words, flush=True)
    status = fastldm(words)
    if status:
        raise SystemExit(status)


def stack(dataset: ImageDataset, indices: list[int]) -> Tensor:
    return torch.stack([dataset[index]["pixel_values"] for index in indices])


def show_reconstructions(model: LatentDiffusion, held_out: ImageDataset, path: Path) -> float:
    """Draw held-out emoji above their reconstructions; gives their mean PSNR in dB."""
    images = stack(held_out, list(range(len(held_out)))).to(model.device)
    with torch.no_grad():
        decoded = [model.decode(model.encode(batch)) for batch in images.split(BATCH)]
    reconstructions = torch.cat(decoded).clamp(-1, 1)
    shown = torch.linspace(0, len(images) - 1, 24).long()
    pairs = torch.stack([images[shown], reconstructions[shown]], dim=1).flatten(0, 1)
    save_image_grid(pairs.cpu(), path, columns=12)
    return float(psnr(reconstructions, images, data_range=2.0).mean())


def sample(model: LatentDiffusion, captions: list[str], guidance_scale: float) -> Tensor:
    """One latent for each caption, [N, C, h, w]."""
    started, latents = time.monotonic(), []
    for begin in range(0, len(captions), BATCH):
        batch = captions[begin : begin + BATCH]
        latents.append(
            model.sample(
                captions=batch,
                seeds=list(range(begin, begin + len(batch))),
                num_inference_steps=25,
                guidance_scale=guidance_scale,
                output="latents",
            )
        )
        done = begin + len(batch)
        left = (time.monotonic() - started) / done * (len(captions) - done)
        print(f"sampled {done} of {len(captions)} captions, {left:.0f} s left", flush=True)
    return torch.cat(latents)


def show_samples(
    model: LatentDiffusion, dataset: ImageDataset, path: Path, guidance_scale: float
) -> float:
    """Draw samples beside the true emoji; gives the share of captions that were followed.

    A caption counts as followed where its sample lies nearer, in latent L2, to its own emoji than
    to one drawn at random among the others.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset), generator=generator)
    own = order[:CHECKED_CAPTIONS].tolist()
    shift = torch.randint(1, len(dataset), (len(own),), generator=generator)
    other = ((torch.tensor(own) + shift) % len(dataset)).tolist()
    captions = [dataset[index]["caption"] for index in own]
    images = stack(dataset, own).to(model.device)

    latents = sample(model, captions, guidance_scale)
    with torch.no_grad():
        to_own = (latents - model.encode(images)).flatten(1).norm(dim=1)
        others = stack(dataset, other).to(model.device)
        to_other = (latents - model.encode(others)).flatten(1).norm(dim=1)
        shown = model.decode(latents[:SHOWN_CAPTIONS]).clamp(-1, 1)
    pairs = torch.stack([images[:SHOWN_CAPTIONS], shown], dim=1).flatten(0, 1)
    labels = [label for caption in captions[:SHOWN_CAPTIONS] for label in (caption, "sample")]
    save_image_grid(pairs.cpu(), path, columns=8, captions=labels)
    return float((to_own < to_other).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument(
        "overrides", nargs="*", help="of both trainings' configs, such as --max_minutes=1"
    )
    arguments, overrides = parser.parse_known_args()
    output: Path = arguments.output_dir
    device = "cuda" if torch.cuda.is_available() else "cpu"

    variant = "-gpu" if device == "cuda" else ""
    model = train(output, variant, [*arguments.overrides, *overrides]).to(device)
    resolution = model.unet.config.sample_size * model.first_stage.downsampling_factor
    data = DataConfig(source="emoji", resolution=resolution, crop="pad")
    quality = show_reconstructions(
        model, load_images(data, split="test"), output / "reconstructions.png"
    )
    followed = show_samples(
        model, load_images(data), output / "samples.png", arguments.guidance_scale
    )
    write_json(output / "results.json", {"psnr": quality, "captions_followed": followed})
    print(
        f"\nreconstructions of held-out emoji: PSNR {quality:.2f} dB"
        f"  ({output / 'reconstructions.png'})"
        f"\ncaptions followed: {followed:.1%} of {CHECKED_CAPTIONS}  ({output / 'samples.png'})"
    )


if __name__ == "__main__":
    main()
