"""The PatchGAN discriminator (Isola et al. 2016, arXiv 1611.07004) of taming-transformers."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError, DataError
from fastldm.models.base import ModelMixin
from fastldm.modules.actnorm import ActNorm

Normalization = Literal["batch", "actnorm", "instance", "group"]

_KERNEL = 4
_LEAKY_SLOPE = 0.2
_WIDEST = 8
_INIT_STD = 0.02
_GROUPS = 32
_SMALLEST_MAP = 3


class PatchDiscriminator(ModelMixin):
    """Judges overlapping patches of an image as real (logit > 0) or made up.

    Strided 4×4 convolutions; with 3 layers a logit sees 70×70 pixels. State-dict keys are those of
    taming's NLayerDiscriminator (``main.0.weight`` …). Convolutions start from N(0, 0.02).

    For statistics of all processes with ``"batch"``, convert before wrapping by DDP:
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)``; ``"actnorm"`` synchronises its
    one-time initialisation by itself, and ``"instance"`` and ``"group"`` need nothing.

    Args:
        in_channels: channels of the images.
        base_channels: channels after the first layer; doubled by each next one, up to 8 times.
        num_layers: strided layers; CompVis's vq-f8 and vq-f16 use 2, the others 3.
        normalization: ``"batch"``, ``"actnorm"``, ``"instance"``, ``"group"`` or None.

    Raises:
        ConfigError: a number is below 1 or the normalisation is unknown.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        num_layers: int = 3,
        normalization: Normalization | None = "batch",
    ) -> None:
        super().__init__()
        numbers = {
            "in_channels": in_channels,
            "base_channels": base_channels,
            "num_layers": num_layers,
        }
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: expected a whole number ≥ 1, got {value!r}")
        if normalization is not None and normalization not in get_args(Normalization):
            raise ConfigError(
                f"normalization: expected one of {', '.join(get_args(Normalization))} or None, "
                f"got {normalization!r}"
            )
        self.in_channels = in_channels
        self.smallest_image = _SMALLEST_MAP * 2**num_layers
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, base_channels, _KERNEL, stride=2, padding=1),
            nn.LeakyReLU(_LEAKY_SLOPE),
        ]
        width = base_channels
        for layer in range(1, num_layers + 1):
            previous, width = width, base_channels * min(2**layer, _WIDEST)
            layers += [
                nn.Conv2d(
                    previous,
                    width,
                    _KERNEL,
                    stride=2 if layer < num_layers else 1,
                    padding=1,
                    bias=normalization != "batch",
                ),
                _normalization(normalization, width),
                nn.LeakyReLU(_LEAKY_SLOPE),
            ]
        layers.append(nn.Conv2d(width, 1, _KERNEL, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 1, h, w] of images [B, C, H, W]; h is about H / 2^num_layers − 2.

        Raises:
            DataError: another channel count, or the image is smaller than 3 · 2^num_layers.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise DataError(
                f"PatchDiscriminator: expected [B, {self.in_channels}, H, W], got {list(x.shape)}"
            )
        if min(x.shape[2:]) < self.smallest_image:
            raise DataError(
                f"PatchDiscriminator: images must be {self.smallest_image}×{self.smallest_image} "
                f"or larger, got {x.shape[2]}×{x.shape[3]}; use fewer num_layers"
            )
        logits: Tensor = self.main(x)
        return logits


def _normalization(kind: Normalization | None, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "actnorm":
        return ActNorm(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(_GROUPS, channels), channels)
    return nn.Identity()


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.weight.normal_(0.0, _INIT_STD)
    elif isinstance(module, nn.BatchNorm2d):
        module.weight.normal_(1.0, _INIT_STD)
        module.bias.zero_()
