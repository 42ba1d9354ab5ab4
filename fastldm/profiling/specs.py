"""Which models stand for a downsampling factor f: the paper's, or narrow ones of the same shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.models import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from fastldm.profiling import paper

FACTORS = tuple(row.f for row in paper.TABLE_14)
REGULARIZATIONS = ("kl", "vq")
CONDITIONINGS = ("none", "class")

NARROW_BASE_CHANNELS = 32
"""Channels of the first level of a narrow UNet: one head of the attention behind it."""
NARROW_FIRST_STAGE_CHANNELS = 16

_IMAGE_CHANNELS = 3
_HEAD_CHANNELS = 32
_CONTEXT_WIDTH = 512
_FIRST_STAGE_CHANNELS = 128
_GROUPS = 32
_NARROW_GROUPS = 8
# CompVis published none with f = 2 and no VQ model with f = 32; those two follow their neighbours.
_FIRST_STAGE_MULTIPLIERS = {
    "kl": {
        2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 2, 2, 4, 4)
    },
    "vq": {
        2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 2, 2, 4, 4)
    },
}  # fmt: skip
# Levels with attention, beside that of the middle block.
_FIRST_STAGE_ATTENTION = {
    "kl": {16: (4,), 32: (4, 5)},
    "vq": {8: (3,), 16: (4,), 32: (4, 5)},
}  # fmt: skip

FirstStage = AutoencoderKL | VQModel
UNet = UNet2DModel | UNet2DConditionModel


@dataclass(frozen=True)
class LDMSpec:
    """The first stage and the UNet of one downsampling factor.

    Attributes:
        f: 1 (diffusion on pixels, without a first stage), 2, 4, 8, 16 or 32.
        regularization: of the first stage, "kl" or "vq"; "none" for f = 1 alone.
        conditioning: "none": the UNets of Table 14; "class": those of Table 13.
        image_size: side of the images in pixels; the paper's is 256.
        base_channels: channels of the UNet's first level; None: the table's.
        first_stage_channels: channels of the first stage's first level; None: CompVis's 128.

    Raises:
        ConfigError: a field has a value that is not listed, or two do not fit each other.
    """

    f: int
    regularization: str
    conditioning: str = "none"
    image_size: int = 256
    base_channels: int | None = None
    first_stage_channels: int | None = None

    def __post_init__(self) -> None:
        if self.f not in FACTORS:
            raise ConfigError(f"f: got {self.f}; accepted: {', '.join(map(str, FACTORS))}")
        accepted = ("none",) if self.f == 1 else REGULARIZATIONS
        if self.regularization not in accepted:
            raise ConfigError(
                f"regularization: got {self.regularization!r} for f = {self.f}; "
                f"accepted: {', '.join(map(repr, accepted))}"
            )
        if self.conditioning not in CONDITIONINGS:
            raise ConfigError(
                f"conditioning: got {self.conditioning!r}; "
                f"accepted: {', '.join(map(repr, CONDITIONINGS))}"
            )
        multiple = self.f * 2 ** (len(self.row.multipliers) - 1)
        if self.image_size < 1 or self.image_size % multiple:
            raise ConfigError(
                f"image_size: got {self.image_size} for f = {self.f}; accepted: multiples of "
                f"{multiple}"
            )
        for name in ("base_channels", "first_stage_channels"):
            value = getattr(self, name)
            multiple = _HEAD_CHANNELS if name == "base_channels" else _NARROW_GROUPS
            if value is not None and (value < 1 or value % multiple):
                raise ConfigError(f"{name}: got {value}; accepted: multiples of {multiple}")

    @property
    def name(self) -> str:
        """Such as "f=4 KL" or "f=1 pixels"."""
        return f"f={self.f} {'pixels' if self.f == 1 else self.regularization.upper()}"

    @property
    def table(self) -> int:
        """The paper's table with the UNet."""
        return 14 if self.conditioning == "none" else 13

    @property
    def row(self) -> paper.UNetRow:
        """What the paper says about the UNet (with a VQ first stage)."""
        return paper.unet_row(self.table, self.f)

    @property
    def is_papers(self) -> bool:
        """Whether the UNet is as wide as the paper's and works on images of its size."""
        widths = (self.base_channels, self.row.channels), (self.image_size, 256)
        return all(given in (None, printed) for given, printed in widths)

    @property
    def latent_channels(self) -> int:
        """Channels of z: of Table 13 or 14 for VQ, of Table 8 for KL."""
        if self.regularization == "kl":
            return paper.first_stage_row("kl", self.f).latent_channels
        return self.row.z[1]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of z of one image: channels, height, width."""
        side = self.image_size // self.f
        return self.latent_channels, side, side

    def unet_config(self) -> dict[str, Any]:
        """The arguments of `UNet2DModel`, or with classes of `UNet2DConditionModel`."""
        row = self.row
        base = self.base_channels or row.channels
        has_attention = [
            row.z[0] // 2**level in row.attention for level in range(len(row.multipliers))
        ]
        kind = "Attn" if self.conditioning == "none" else "CrossAttn"
        config: dict[str, Any] = {
            "sample_size": self.latent_shape[1],
            "in_channels": self.latent_channels,
            "out_channels": self.latent_channels,
            "block_out_channels": [base * multiplier for multiplier in row.multipliers],
            "down_block_types": [f"{kind * found}DownBlock2D" for found in has_attention],
            "up_block_types": [f"{kind * found}UpBlock2D" for found in reversed(has_attention)],
            "layers_per_block": 2,
        }
        if self.conditioning == "none":
            return {**config, "attention_head_dim": _HEAD_CHANNELS}
        return {
            **config,
            "cross_attention_dim": _CONTEXT_WIDTH,
            "transformer_layers_per_block": 1,
            "num_attention_heads": 1,
        }

    def first_stage_config(self) -> dict[str, Any] | None:
        """The arguments of `AutoencoderKL` or `VQModel`; None for f = 1."""
        if self.f == 1:
            return None
        multipliers = _FIRST_STAGE_MULTIPLIERS[self.regularization][self.f]
        attention = _FIRST_STAGE_ATTENTION[self.regularization].get(self.f, ())
        kinds = ["Attn" * (level in attention) for level in range(len(multipliers))]
        base = self.first_stage_channels or _FIRST_STAGE_CHANNELS
        config: dict[str, Any] = {
            "block_out_channels": [base * multiplier for multiplier in multipliers],
            "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
            "layers_per_block": 2,
            "latent_channels": self.latent_channels,
            "sample_size": self.image_size,
            "norm_num_groups": _NARROW_GROUPS if base % _GROUPS else _GROUPS,
        }
        if self.regularization == "vq":
            config["num_vq_embeddings"] = self.row.num_embeddings
        return config

    def build_unet(self, device: str | torch.device = "cpu") -> UNet:
        """The UNet with fresh weights, on "meta" without any."""
        kind = UNet2DModel if self.conditioning == "none" else UNet2DConditionModel
        with torch.device(device):
            return kind(**self.unet_config())

    def build_first_stage(self, device: str | torch.device = "cpu") -> FirstStage | None:
        """The first stage with fresh weights, on "meta" without any; None for f = 1."""
        config = self.first_stage_config()
        if config is None:
            return None
        kind = AutoencoderKL if self.regularization == "kl" else VQModel
        with torch.device(device):
            return kind(**config)

    def unet_inputs(
        self,
        batch_size: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, ...]:
        """What the UNet is called with: z_t, t and, with classes, their context.

        Returns:
            [B, C, h, w], int64 [B], and [B, 1, 512].
        """
        z = torch.randn(batch_size, *self.latent_shape, device=device, dtype=dtype)
        timesteps = torch.full((batch_size,), 500, device=device)
        if self.conditioning == "none":
            return z, timesteps
        return z, timesteps, torch.randn(batch_size, 1, _CONTEXT_WIDTH, device=device, dtype=dtype)

    def images(
        self,
        batch_size: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images [B, 3, H, W] to encode."""
        shape = (batch_size, _IMAGE_CHANNELS, self.image_size, self.image_size)
        return torch.rand(shape, device=device, dtype=dtype) * 2 - 1


def narrow(
    f: int, regularization: str, conditioning: str = "none", image_size: int = 256
) -> LDMSpec:
    """Models of the paper's shape with few channels, for a quick look."""
    return LDMSpec(
        f,
        regularization,
        conditioning,
        image_size,
        NARROW_BASE_CHANNELS,
        NARROW_FIRST_STAGE_CHANNELS,
    )


def pairs(factors: Iterable[int], regularizations: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Each f with each regularisation; f = 1, which has no first stage, once with "none"."""
    chosen = tuple(regularizations)
    for f in factors:
        for regularization in ("none",) if f == 1 else chosen:
            yield f, regularization


def parameters_of(module: torch.nn.Module | None) -> int:
    """Number of trainable and frozen weights."""
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())
