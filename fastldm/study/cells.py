"""One cell of a study: an f and a regularisation, and the trainings that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastldm.errors import ConfigError
from fastldm.study.config import StudyConfig
from fastldm.training.config import (
    AutoencoderTrainingConfig,
    LatentDiffusionTrainingConfig,
    ModelConfig,
    SamplingConfig,
)

Regularization = Literal["none", "kl", "vq"]


@dataclass(frozen=True)
class Cell:
    """An f and how its first stage is regularised; ``"none"`` for pixels, f = 1."""

    f: int
    regularization: Regularization

    @property
    def name(self) -> str:
        """Such as ``kl-f4``; also of its folder."""
        return "pixel" if self.is_pixel else f"{self.regularization}-f{self.f}"

    @property
    def is_pixel(self) -> bool:
        """Whether there is no first stage."""
        return self.f == 1

    def folder(self, config: StudyConfig) -> Path:
        """Where its models and figures are."""
        return Path(config.output_dir, "cells", self.name)

    def latent_channels(self, config: StudyConfig) -> int:
        """c.

        Raises:
            ConfigError: the config names none for this f.
        """
        if self.is_pixel:
            return config.data.channels
        name = f"{self.regularization}_channels"
        return _entry(getattr(config.first_stage, name), self.f, f"first_stage.{name}")


def cells_of(config: StudyConfig) -> list[Cell]:
    """The cells in the order in which they are trained."""
    pixel = [Cell(1, "none")] if config.pixel else []
    return [*pixel, *(Cell(f, "kl") for f in config.kl), *(Cell(f, "vq") for f in config.vq)]


def first_stage_training(
    cell: Cell, config: StudyConfig, **limit: Any
) -> AutoencoderTrainingConfig:
    """The training of a cell's first stage.

    Args:
        limit: ``max_steps`` or ``max_minutes``.
    """
    settings = config.first_stage
    levels = settings.block_out_channels(cell.f)
    fields: dict[str, Any] = {
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "block_out_channels": levels,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": settings.layers_per_block,
        "latent_channels": cell.latent_channels(config),
        "norm_num_groups": settings.norm_num_groups,
        "sample_size": config.data.resolution,
        "mid_block_add_attention": False,
    }
    if cell.regularization == "vq":
        codes = _entry(settings.codebook_size, cell.f, "first_stage.codebook_size")
        fields |= {"num_vq_embeddings": codes, **settings.vq_config}
    kind = "VQModel" if cell.regularization == "vq" else "AutoencoderKL"
    return AutoencoderTrainingConfig(
        output_dir=str(cell.folder(config) / "first_stage"),
        model=ModelConfig(kind, fields),
        loss=settings.loss,
        discriminator=ModelConfig("PatchDiscriminator", settings.discriminator),
        lr_schedule="cosine",
        **_shared(config, settings),
        **limit,
    )


def diffusion_training(
    cell: Cell, config: StudyConfig, first_stage: Path, **limit: Any
) -> LatentDiffusionTrainingConfig:
    """The training of a cell's diffusion model.

    Args:
        first_stage: folder of the trained autoencoder.
        limit: ``max_steps`` or ``max_minutes``.
    """
    settings = config.diffusion
    side = config.data.resolution // cell.f
    levels = settings.channels(cell.f, side)
    attends = [side // 2**level in settings.attention_sides for level in range(len(levels))]
    unet = {
        "block_out_channels": levels,
        "down_block_types": [f"{'Attn' * attend}DownBlock2D" for attend in attends],
        "up_block_types": [f"{'Attn' * attend}UpBlock2D" for attend in reversed(attends)],
        "layers_per_block": settings.layers_per_block,
        "attention_head_dim": settings.attention_head_dim,
        "norm_num_groups": settings.norm_num_groups,
        "add_attention": any(attends),
    }
    cached = settings.latent_cache and not cell.is_pixel
    return LatentDiffusionTrainingConfig(
        output_dir=str(cell.folder(config) / "diffusion"),
        first_stage=str(first_stage),
        unet=ModelConfig("UNet2DModel", unet),
        latent_cache=str(cell.folder(config) / "latents") if cached else None,
        cache_flips=config.data.horizontal_flip,
        scheduler=ModelConfig(
            "DDIMScheduler",
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.0015,
                "beta_end": 0.0195,
                "prediction_type": settings.prediction_type,
                "clip_sample": False,
                "set_alpha_to_one": False,
                "steps_offset": 1,
            },
        ),
        scaling="first_stage" if cell.is_pixel else settings.scaling,
        sampling=SamplingConfig(num_inference_steps=config.evaluation.num_inference_steps),
        **_shared(config, settings),
        **limit,
    )


def _shared(config: StudyConfig, settings: Any) -> dict[str, Any]:
    """What both trainings take over; what is measured, the study measures itself."""
    return {
        "data": config.data,
        "seed": config.seed,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup_steps,
        "max_grad_norm": settings.max_grad_norm,
        "ema_decay": settings.ema_decay,
        "resume": "latest",
        "log_every": 10,
        "sample_every": 0,
        "sample_images": 1,
        "validate_every": 0,
        "checkpoint_every": config.checkpoint_every,
        "keep_checkpoints": 1,
        "tensorboard": False,
        "progress_bar": config.progress_bar,
        "cpu": config.cpu,
    }


def _entry(table: dict[int, int], f: int, name: str) -> int:
    if f not in table:
        raise ConfigError(f"{name}: no entry for f = {f}; there are {sorted(table)}")
    return table[f]
