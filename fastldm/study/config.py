"""What a study trains, for how much, and how it measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastldm.data.config import DataConfig
from fastldm.errors import ConfigError
from fastldm.losses.first_stage_config import FirstStageLossConfig

FACTORS = (2, 4, 8, 16, 32)
"""The f of the paper's first stages (Table 8); f = 1 is the model of pixels."""

_MAX_WIDTH_MULTIPLE = 4
_LOWEST_SIDE = 4
_MOST_LEVELS = 4


@dataclass
class FirstStageSettings:
    """How every first stage is built and trained.

    Attributes:
        base_channels: of the first level; each level has twice the one above, at most four times
            the first.
        layers_per_block: residual blocks a level.
        norm_num_groups: groups of every GroupNorm.
        kl_channels, vq_channels: latent channels c for each f; the paper's (Table 8).
        codebook_size: number of codes for each f.
        vq_config: further fields of `VQModel`. The codebook's moving averages make short trainings
            use all of it.
        discriminator: fields of `PatchDiscriminator`, where `loss` has it on.
        loss: of the first stage. LPIPS and the discriminator are off, because the first needs
            weights from the network and the second a long training.
        batch_size, learning_rate, warmup_steps, max_grad_norm, ema_decay: of the training; the
            learning rate decays by a cosine.
    """

    base_channels: int = 64
    layers_per_block: int = 1
    norm_num_groups: int = 16
    kl_channels: dict[int, int] = field(default_factory=lambda: {2: 2, 4: 3, 8: 4, 16: 16, 32: 64})
    vq_channels: dict[int, int] = field(default_factory=lambda: {2: 2, 4: 3, 8: 4, 16: 8, 32: 16})
    codebook_size: dict[int, int] = field(
        default_factory=lambda: {2: 2048, 4: 8192, 8: 16384, 16: 16384, 32: 16384}
    )
    vq_config: dict[str, Any] = field(
        default_factory=lambda: {
            "codebook_ema_decay": 0.99,
            "codebook_initialization": "data",
            "dead_code_threshold": 0.1,
        }
    )
    discriminator: dict[str, Any] = field(default_factory=dict)
    loss: FirstStageLossConfig = field(
        default_factory=lambda: FirstStageLossConfig(
            perceptual_weight=0.0, discriminator_weight=0.0
        )
    )
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    max_grad_norm: float | None = None
    ema_decay: float | None = 0.995

    def block_out_channels(self, f: int) -> list[int]:
        """Channels of the levels of the first stage with this f."""
        levels = range(int(math.log2(f)) + 1)
        return [self.base_channels * min(2**level, _MAX_WIDTH_MULTIPLE) for level in levels]


@dataclass
class DiffusionSettings:
    """How every diffusion model is built and trained; the learning rate is constant.

    Attributes:
        base_channels: of the UNet's first level, where `block_out_channels` does not say.
        block_out_channels: channels of the UNet's levels for each f. By default 1, 2, 3 and 4 times
            `base_channels`, in as many levels as bring the latents to 4×4, at least two and at most
            four.
        layers_per_block: residual blocks a level.
        attention_sides: sides of the feature maps that have attention.
        attention_head_dim: channels a head.
        norm_num_groups: groups of every GroupNorm.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        scaling: of the latents, as of ``train-ldm``; pixels are always taken as they are.
        latent_cache: encode the images once rather than in every step.
        batch_size, learning_rate, warmup_steps, max_grad_norm, ema_decay: of the training.
    """

    base_channels: int = 64
    block_out_channels: dict[int, list[int]] = field(default_factory=dict)
    layers_per_block: int = 2
    attention_sides: list[int] = field(default_factory=lambda: [32, 16, 8])
    attention_head_dim: int = 32
    norm_num_groups: int = 32
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    scaling: Literal["first_batch", "per_channel"] = "first_batch"
    latent_cache: bool = True
    batch_size: int = 32
    learning_rate: float = 5e-4
    warmup_steps: int = 100
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = 0.999

    def channels(self, f: int, side: int) -> list[int]:
        """Channels of the UNet's levels for latents of this side."""
        if f in self.block_out_channels:
            return self.block_out_channels[f]
        levels = int(math.log2(max(1, side / _LOWEST_SIDE))) + 1
        levels = min(_MOST_LEVELS, max(2, levels))
        return [self.base_channels * multiple for multiple in range(1, levels + 1)]


@dataclass
class EvaluationSettings:
    """What is measured.

    Attributes:
        images: held-out images for reconstructions, at most.
        reference_images: training images that samples are compared with and that principal
            components are fitted to, at most.
        samples: images drawn at each point of a curve.
        num_inference_steps: of DDIM.
        batch_size: images at once.
        features: what the distance of samples is measured by: ``"inception"`` (the FID),
            ``"random_conv"`` (no weights needed), ``"auto"`` (the first where its weights are here,
            else the second), or a classifier of torchvision by name, whose weights are
            `features_weights`.
        features_weights: local file; for ``"inception"`` torch-fidelity's Inception weights.
        lpips_net, lpips_weights: backbone, and a local file of its weights. LPIPS is measured where
            the file is given or in torch.hub's cache.
        bound_images: held-out images for the variational bound, at most.
        bound_groups: groups of time steps for it, with one draw an image; null takes all steps.
        bound_variance: of the reverse steps.
    """

    images: int = 512
    reference_images: int = 2000
    samples: int = 512
    num_inference_steps: int = 50
    batch_size: int = 64
    features: str = "auto"
    features_weights: str | None = None
    lpips_net: Literal["alex", "vgg", "squeeze"] = "alex"
    lpips_weights: str | None = None
    bound_images: int = 64
    bound_groups: int | None = 50
    bound_variance: Literal["fixed_small", "fixed_large"] = "fixed_large"


@dataclass(kw_only=True)
class StudyConfig:
    """One budget, spent on a first stage and an unconditional diffusion model at each f.

    Raises:
        ConfigError: an f is unknown or does not divide the resolution, or a value is out of range.
    """

    output_dir: str
    """Folder for models, results, plots and the report. A study there goes on."""
    data: DataConfig
    """Images to train on; held-out ones are measured on."""
    kl: list[int] = field(default_factory=lambda: [2, 4, 8])
    """f of the first stages with a KL term."""
    vq: list[int] = field(default_factory=lambda: [4])
    """f of the first stages with a codebook."""
    pixel: bool = True
    """Train the baseline, a diffusion model of pixels (f = 1), on the whole budget."""
    budget_tflop: float | None = None
    """Training cost of each f in 10¹² floating-point operations, both stages together."""
    budget_minutes: float | None = None
    """Training time of each f in minutes, both stages together; in place of `budget_tflop`."""
    first_stage_share: float = 0.5
    """Share of the budget for the first stage. Encoding the images for the diffusion model counts
    into the other share where the budget is in operations."""
    points: int = 4
    """Points of the diffusion training at which samples are measured, equally far apart."""
    first_stage: FirstStageSettings = field(default_factory=FirstStageSettings)
    """How first stages are built and trained."""
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    """How diffusion models are built and trained."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What is measured."""
    seed: int = 0
    """Seed of weights, noise and samples."""
    checkpoint_every: int = 500
    """Steps between checkpoints of a training."""
    overwrite: bool = False
    """Start anew where `output_dir` holds a study, which is then deleted."""
    cpu: bool = False
    """Stay on the CPU although there is an accelerator."""
    progress_bar: bool = True
    """Show progress bars with the time left."""

    def __post_init__(self) -> None:
        self._check_factors()
        if (self.budget_tflop is None) == (self.budget_minutes is None):
            raise ConfigError("budget_tflop, budget_minutes: give one of them")
        for name in ("budget_tflop", "budget_minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value}")
        if not 0 < self.first_stage_share < 1:
            raise ConfigError(
                f"first_stage_share: expected a number in (0, 1), got {self.first_stage_share}"
            )
        for name, value, least in (
            ("points", self.points, 1),
            ("checkpoint_every", self.checkpoint_every, 0),
            ("evaluation.images", self.evaluation.images, 1),
            ("evaluation.reference_images", self.evaluation.reference_images, 2),
            ("evaluation.samples", self.evaluation.samples, 2),
            ("evaluation.num_inference_steps", self.evaluation.num_inference_steps, 1),
            ("evaluation.batch_size", self.evaluation.batch_size, 1),
            ("evaluation.bound_images", self.evaluation.bound_images, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}")

    def _check_factors(self) -> None:
        if not (self.pixel or self.kl or self.vq):
            raise ConfigError("pixel, kl, vq: there is nothing to train")
        resolution = self.data.resolution
        for name, factors in (("kl", self.kl), ("vq", self.vq)):
            for f in factors:
                if f not in FACTORS:
                    accepted = ", ".join(map(str, FACTORS))
                    raise ConfigError(f"{name}: f must be one of {accepted}, got {f}")
                if resolution % f or resolution == f:
                    raise ConfigError(
                        f"{name}: f = {f} does not divide data.resolution = {resolution} into "
                        "latents of at least 2×2"
                    )
            if len(set(factors)) < len(factors):
                raise ConfigError(f"{name}: an f is there twice: {factors}")
