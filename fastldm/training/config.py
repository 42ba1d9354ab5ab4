"""Typed configurations of both trainers; YAML files under ``configs/`` hold their fields."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastldm.data.config import DataConfig
from fastldm.errors import ConfigError
from fastldm.losses.diffusion import DiffusionLossConfig
from fastldm.losses.first_stage_config import FirstStageLossConfig
from fastldm.storage import atomic_file

MixedPrecision = Literal["no", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass
class ModelConfig:
    """A model or scheduler: the class, by its bare name, and its configuration."""

    class_name: str
    """Such as ``AutoencoderKL``; only fastldm's own classes are accepted."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the class's configuration; those left out have the class's defaults."""
    pretrained: str | None = None
    """Folder or Hub repository to start from; ``config`` then replaces single fields."""


@dataclass(kw_only=True)
class TrainingConfig:
    """What both trainers have: budget, optimiser, logging and checkpoints.

    Raises:
        ConfigError: a value is out of range, or neither a number of steps nor of minutes is given.
    """

    output_dir: str
    """Folder for checkpoints, logs, pictures and the trained model."""
    seed: int = 0
    """Seed of the weights, the noise and (added to ``data.seed``) nothing else."""
    batch_size: int = 8
    """Images a micro-batch and process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches whose gradients make one optimiser step."""
    max_steps: int | None = None
    """Optimiser steps of the whole run, earlier parts of a resumed run included."""
    max_minutes: float | None = None
    """Minutes of training of the whole run; with ``max_steps`` the first limit reached counts."""
    resume: str = "none"
    """``latest`` goes on from the newest checkpoint in ``output_dir`` if there is one, ``none``
    starts anew, anything else is the path of a checkpoint."""
    overwrite: bool = False
    """Start anew even where ``output_dir`` holds checkpoints, which are then deleted."""
    cpu: bool = False
    """Train on the CPU although there is an accelerator."""
    mixed_precision: MixedPrecision | None = None
    """Precision of the forward passes; by default what ``accelerate launch`` says, else ``no``."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    scale_lr: bool = False
    """Multiply the learning rate by batch × processes × accumulation, as CompVis does."""
    lr_schedule: Schedule = "constant"
    """Decay over the budget, whether that is in steps or in minutes."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    min_lr_ratio: float = 0.0
    """Share of the peak learning rate that the decay ends at."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    adam_eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float | None = None
    """Gradient norm to clip to, for each optimiser; None does not clip."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights, which is what is saved; None keeps none."""
    log_every: int = 1
    """Steps between lines of ``metrics.jsonl``; a line holds the mean over them."""
    sample_every: int = 1000
    """Steps between picture grids; 0 draws one only at the end."""
    sample_images: int = 16
    """Images in a grid."""
    validate_every: int = 1000
    """Steps between measurements on held-out images; 0 measures only at the end."""
    validation_images: int = 64
    """Held-out images to measure on."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0 writes one only at the end and at an interruption."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    tensorboard: bool = True
    """Write TensorBoard events beside ``metrics.jsonl``."""
    progress_bar: bool = True
    """Show a progress bar with images per second and the time left."""

    def __post_init__(self) -> None:
        self.adam_betas = (self.adam_betas[0], self.adam_betas[1])
        self._check_minimum(
            1, "batch_size", "gradient_accumulation_steps", "log_every", "sample_images",
            "validation_images", "keep_checkpoints",
        )  # fmt: skip
        self._check_minimum(
            0, "seed", "warmup_steps", "sample_every", "validate_every", "checkpoint_every"
        )
        if self.max_steps is None and self.max_minutes is None:
            raise ConfigError("max_steps, max_minutes: give at least one of them")
        for name in ("max_steps", "max_minutes", "learning_rate", "adam_eps", "max_grad_norm"):
            self._check_range(name, lambda value: value > 0, "a number above 0")
        self._check_range("weight_decay", lambda value: value >= 0, "a number of at least 0")
        self._check_range("min_lr_ratio", lambda value: 0 <= value <= 1, "a number in [0, 1]")
        self._check_range("ema_decay", lambda value: 0 <= value < 1, "a number in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas: expected numbers in [0, 1), got {self.adam_betas}")

    def _check_minimum(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name}: expected an integer of at least {minimum}, got {value}")

    def _check_range(self, name: str, accepted: Any, description: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and accepted(value)):
            raise ConfigError(f"{name}: expected {description}, got {value}")


@dataclass(kw_only=True)
class AutoencoderTrainingConfig(TrainingConfig):
    """Training of the first stage."""

    data: DataConfig
    """Images to train on; held-out ones are measured on."""
    model: ModelConfig
    """``AutoencoderKL`` or ``VQModel``."""
    loss: FirstStageLossConfig = field(default_factory=FirstStageLossConfig)
    """The first-stage loss."""
    discriminator: ModelConfig = field(default_factory=lambda: ModelConfig("PatchDiscriminator"))
    """Judge of reconstructions; its ``in_channels`` follow the autoencoder's unless given."""
    discriminator_learning_rate: float | None = None
    """Peak learning rate of the discriminator; by default ``learning_rate``."""
    adam_betas: tuple[float, float] = (0.5, 0.9)
    """Decay of Adam's two moments."""


@dataclass
class TokenizerConfig:
    """The tokenizer that is learned from the captions, or one to load."""

    vocab_size: int = 30522
    """The most tokens to learn; few captions give fewer."""
    model: Literal["wordpiece", "bpe"] = "wordpiece"
    """WordPiece as BERT's, or byte-pair encoding."""
    lowercase: bool = True
    """Ignore case and accents."""
    pretrained: str | None = None
    """Folder of a tokenizer to use as it is."""


@dataclass
class SamplingConfig:
    """How pictures are drawn during training."""

    num_inference_steps: int = 50
    """Steps of the sampler."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    eta: float = 0.0
    """η of DDIM."""


@dataclass(kw_only=True)
class LatentDiffusionTrainingConfig(TrainingConfig):
    """Training of the diffusion model on the latents of a trained first stage.

    Sizes that follow from other parts are filled in where a model's config leaves them out: the
    UNet's channels, sample size and context width, the text encoder's vocabulary and the number
    of classes.
    """

    first_stage: str
    """Folder of the trained autoencoder."""
    unet: ModelConfig
    """``UNet2DModel`` or ``UNet2DConditionModel``."""
    data: DataConfig | None = None
    """Images; needed unless `latent_cache` exists."""
    latent_cache: str | None = None
    """Folder of latents from ``fastldm encode``; made when it is missing. None encodes the images
    of every step."""
    cache_flips: bool = False
    """When the cache is made: also encode every image mirrored, and train on either at random."""
    scheduler: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            "DDIMScheduler",
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.0015,
                "beta_end": 0.0195,
                "clip_sample": False,
                "set_alpha_to_one": False,
                "steps_offset": 1,
            },
        )
    )
    """The noise schedule, and the sampler that is saved with the model."""
    conditioning: Literal["none", "crossattn", "concat", "hybrid", "class"] = "none"
    """How the UNet is conditioned; see `fastldm.LatentDiffusion`."""
    conditioner: ModelConfig | None = None
    """``TextEncoder`` or ``ClassEmbedder``, trained together with the UNet."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """For a text encoder."""
    conditioning_dropout: float = 0.0
    """Share of the samples trained without condition, for guidance."""
    scaling: Literal["first_batch", "per_channel", "first_stage"] = "first_batch"
    """Latents are divided by the standard deviation of the first batch (paper, appendix G);
    normalised channel by channel over the cache; or scaled as the first stage's config says."""
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    """Terms and weights of the loss."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """For the grids."""
    ema_decay: float | None = 0.9999
    """Decay of the moving average of UNet and conditioner; None keeps none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None and self.latent_cache is None:
            raise ConfigError("data, latent_cache: give at least one of them")


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON and YAML can hold it: tuples become lists."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def save_config(config: Any, path: str | Path) -> None:
    """Write a configuration as YAML that ``--config`` reads again, atomically."""
    import yaml

    with atomic_file(path) as temporary:
        text = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
