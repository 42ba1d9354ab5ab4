"""What a study measures of a cell: reconstructions, samples, and rate against distortion."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.data import save_image_grid
from fastldm.errors import ConfigError
from fastldm.latent_diffusion import LatentDiffusion
from fastldm.losses import BoundTerms, VariationalBound
from fastldm.losses.pretrained import is_cached
from fastldm.metrics import (
    LPIPS,
    FrechetFeatureDistance,
    FrechetInceptionDistance,
    NetworkFeatures,
    RandomConvFeatures,
    ReconstructionMetrics,
)
from fastldm.metrics.fid import INCEPTION_URL
from fastldm.models import VQModel
from fastldm.study.cells import Cell
from fastldm.study.config import EvaluationSettings, StudyConfig
from fastldm.training.noise import Stream, generators
from fastldm.training.validation import fixed_items

_LEVELS = 127.5
"""Grey levels a unit of [−1, 1]."""
_SHOWN = 16
_SAMPLE_SEED = 1_000_000
"""Sets the noise of samples apart from that of training."""


@dataclass
class Material:
    """The images that all cells are measured with, in [−1, 1], on the 256 levels.

    Attributes:
        reference: training images, [N, C, H, W].
        held_out: images that were not trained on, where the data has any, [M, C, H, W].
    """

    reference: Tensor
    held_out: Tensor


def load_material(config: StudyConfig) -> Material:
    """Load both sets of images.

    Raises:
        DataError: the data cannot be used.
    """
    evaluation = config.evaluation
    count = max(evaluation.images, evaluation.bound_images)
    return Material(
        _on_levels(fixed_items(config.data, evaluation.reference_images, "train")["pixel_values"]),
        _on_levels(fixed_items(config.data, count)["pixel_values"]),
    )


def _on_levels(images: Tensor) -> Tensor:
    return ((images + 1) * _LEVELS).round() / _LEVELS - 1


def make_lpips(settings: EvaluationSettings) -> tuple[LPIPS | None, str]:
    """LPIPS where its backbone is here, and a line that says which, or why there is none."""
    if settings.lpips_weights is None and not LPIPS.is_available(settings.lpips_net):
        return None, (
            f"LPIPS was not measured: the weights of its backbone ({settings.lpips_net}) are "
            "neither given (evaluation.lpips_weights) nor in torch.hub's cache"
        )
    return LPIPS(settings.lpips_net, settings.lpips_weights), f"LPIPS ({settings.lpips_net})"


def measure_reconstructions(
    images: Tensor, reconstruct: Any, settings: EvaluationSettings, codebook_size: int | None = None
) -> dict[str, float]:
    """PSNR, SSIM, LPIPS where it is available, and codebook usage.

    Args:
        images: [N, C, H, W] in [−1, 1].
        reconstruct: from a batch to reconstructions and the indices of the codes, or None.
    """
    lpips, _ = make_lpips(settings)
    metrics = ReconstructionMetrics(lpips=lpips, codebook_size=codebook_size)
    for batch in images[: settings.images].split(settings.batch_size):
        reconstructions, indices = reconstruct(batch)
        metrics.update(batch.to(reconstructions.device), reconstructions, indices)
    return metrics.compute()


@torch.no_grad()
def measure_first_stage(
    first_stage: Any, material: Material, settings: EvaluationSettings, path: Path
) -> dict[str, float]:
    """The figures of a trained first stage on held-out images; draws some pairs to `path`."""
    is_vq = isinstance(first_stage, VQModel)
    device = next(first_stage.parameters()).device

    def reconstruct(images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = images.to(device)
        indices = (
            first_stage.quantize(first_stage.encode(images).latents).indices if is_vq else None
        )
        return first_stage(images).sample.float(), indices

    size = first_stage.config["num_vq_embeddings"] if is_vq else None
    figures = measure_reconstructions(material.held_out, reconstruct, settings, size)
    shown = material.held_out[:: max(1, len(material.held_out) // _SHOWN)][:_SHOWN]
    pairs = torch.stack([shown, reconstruct(shown)[0].cpu()], dim=1).flatten(0, 1)
    save_image_grid(pairs, path, columns=8)
    return figures


class SampleDistance:
    """Distance of samples to the reference images, by the features that a config names.

    Args:
        reference: [N, C, H, W].
        device: where the network runs.

    Attributes:
        name: ``"FID"``, or of the features, which is then no FID.

    Raises:
        ConfigError: the features are unknown, or their weights are not given.
        CheckpointError: the weights cannot be used.
    """

    def __init__(self, config: StudyConfig, reference: Tensor, device: torch.device) -> None:
        settings = config.evaluation
        kind, weights = settings.features, settings.features_weights
        if kind == "auto":
            kind = "inception" if weights or is_cached(INCEPTION_URL) else "random_conv"
        self._batch_size = settings.batch_size
        self._reference = reference
        self._device = device
        self._inception: str | None = None
        self._features: FrechetFeatureDistance | None = None
        if kind == "inception":
            self.name = "FID"
            self._inception = weights or ""
            return
        if kind == "random_conv":
            self.name = "feature distance (random convolutions)"
            features: Any = RandomConvFeatures(reference.shape[1], reference.shape[2])
        elif weights is None:
            raise ConfigError(
                f"evaluation.features: {kind!r} needs a local file of its weights as "
                "evaluation.features_weights; accepted without: auto, random_conv"
            )
        else:
            self.name = f"feature distance ({kind})"
            features = NetworkFeatures(kind, weights)
        network = features.to(device)
        self._features = FrechetFeatureDistance(lambda images: network(images.to(device)))
        for batch in reference.split(self._batch_size):
            self._features.update_reference(batch)

    def __call__(self, images: Tensor) -> float:
        """The distance of images [N, C, H, W]."""
        if self._features is not None:
            return self._features.to(images, self._batch_size)
        fid = FrechetInceptionDistance(self._inception or None, device=self._device)
        for batch in self._reference.split(self._batch_size):
            fid.update_reference(batch)
        for batch in images.split(self._batch_size):
            fid.update(batch)
        return fid.compute()


def draw_samples(model: LatentDiffusion, config: StudyConfig, path: Path) -> tuple[Tensor, float]:
    """Samples [N, C, H, W] on the CPU, and the seconds they took; draws some to `path`."""
    settings = config.evaluation
    side = config.data.resolution
    started, parts = time.monotonic(), []
    for first in range(0, settings.samples, settings.batch_size):
        count = min(settings.batch_size, settings.samples - first)
        parts.append(
            model.sample(
                count,
                num_inference_steps=settings.num_inference_steps,
                seeds=_SAMPLE_SEED + config.seed + first,
                size=(side, side),
            ).cpu()
        )
    seconds = time.monotonic() - started
    samples = torch.cat(parts)
    save_image_grid(samples[:_SHOWN], path, columns=8)
    return samples, seconds


@torch.no_grad()
def measure_bound(
    model: LatentDiffusion, cell: Cell, config: StudyConfig, held_out: Tensor
) -> dict[str, Any]:
    """The variational bound on held-out images, and rate against distortion.

    Rates are bits over all dimensions of the image, also where the model is one of latents, and
    distortions are of decoded images in grey levels (0…255), so that curves of all f compare. The
    bound itself compares only among models of the same pixels or latents.

    Returns:
        ``prior``, ``steps`` and ``decoder`` (L_T, the sum of L_{t−1}, L_0) and their sum ``bound``,
        bits a dimension of the pixels or latents; ``timesteps`` (means), ``rate`` and
        ``distortion``, a list each.
    """
    settings = config.evaluation
    objective = model.objective
    bound = VariationalBound(
        model.scheduler.alphas_cumprod,
        objective.prediction_type,
        likelihood="discretized" if cell.is_pixel else "gaussian",
        variance=settings.bound_variance,
        clip_sample=cell.is_pixel,
    )
    generator = torch.Generator().manual_seed(config.seed)
    conditioning = model.encode_condition(None, 1)
    found: list[BoundTerms] = []
    dims_per_pixel_dim = 1.0
    for images in held_out[: settings.bound_images].split(settings.batch_size):
        images = images.to(model.device)
        sources = generators(config.seed, Stream.POSTERIOR, len(found), range(len(images)))
        z = model.encode(images, sources)
        dims_per_pixel_dim = z[0].numel() / images[0].numel()

        def squared_error(z_hat: Tensor, images: Tensor = images) -> Tensor:
            decoded = model.decode(z_hat.float()).clamp(-1, 1)
            return ((decoded - images) * _LEVELS).square().flatten(1).mean(1)

        found.append(
            bound.terms(
                lambda z_t, t: model.predict(z_t, t, conditioning),
                z,
                num_groups=settings.bound_groups,
                generator=generator,
                squared_error=squared_error,
            )
        )
    rates = torch.cat([terms.rates for terms in found], dim=1).mean(1) * dims_per_pixel_dim
    errors = torch.cat([terms.squared_errors for terms in found], dim=1).mean(1).sqrt()
    times = torch.cat([terms.timesteps for terms in found], dim=1).double().mean(1)
    prior = torch.cat([terms.prior for terms in found]).mean()
    steps = torch.cat([terms.steps for terms in found], dim=1).mean(1)
    return {
        "prior": float(prior),
        "steps": float(steps[:-1].sum()),
        "decoder": float(steps[-1]),
        "bound": float(prior + steps.sum()),
        "images": sum(len(terms.prior) for terms in found),
        "timesteps": times.tolist(),
        "rate": rates.tolist(),
        "distortion": errors.tolist(),
    }
