"""The affine map between the first stage's latents and those that the diffusion model sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fastldm.errors import ConfigError, DataError


@dataclass(frozen=True)
class LatentScale:
    """z = (z_raw − mean)·factor/std, as diffusers reads the same fields of an autoencoder.

    Attributes:
        channels: C.
        factor: ``scaling_factor``, for all channels.
        mean, std: of each channel, or both None for `shift` and 1.
        shift: ``shift_factor``, the mean of all channels where `mean` is None.

    Raises:
        ConfigError: a value is not finite or not positive, or a list has not C entries.
    """

    channels: int
    factor: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor) or self.factor <= 0:
            raise ConfigError(f"scaling_factor: got {self.factor}; accepted: a number above 0")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("latent_mean, latent_std: give both or neither")
        for name, values, positive in (
            ("latent_mean", self.mean, False),
            ("latent_std", self.std, True),
        ):
            if values is not None and (
                len(values) != self.channels
                or not all(math.isfinite(value) for value in values)
                or (positive and min(values) <= 0)
            ):
                raise ConfigError(
                    f"{name}: got {list(values)}; accepted: {self.channels} finite numbers"
                    f"{', above 0' if positive else ''}"
                )

    @classmethod
    def of(
        cls,
        channels: int,
        config: Any,
        factor: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Self:
        """From a first stage's config, where no value is given."""
        factor = config.scaling_factor if factor is None else factor
        mean = config.get("latents_mean") if mean is None else mean
        std = config.get("latents_std") if std is None else std
        return cls(
            channels,
            float(factor),
            None if mean is None else tuple(map(float, mean)),
            None if std is None else tuple(map(float, std)),
            config.get("shift_factor") or 0.0,
        )

    @classmethod
    def calibrated(cls, raw: Tensor, per_channel: bool = False) -> Self:
        """With which `raw` gets standard deviation 1 (paper, appendix G).

        Args:
            raw: the first stage's latents, [B, C, h, w].
            per_channel: mean 0 and standard deviation 1 in each channel, rather than one factor.

        Raises:
            DataError: the standard deviation is 0 or not finite.
        """
        dims = (0, 2, 3) if per_channel else (0, 1, 2, 3)
        std, mean = torch.std_mean(raw.double(), dim=dims)
        if not (std.isfinite() & (std > 0)).all():
            raise DataError(
                f"latents: their standard deviation is {std.tolist()}; the first stage gives "
                "constant or non-finite latents"
            )
        if per_channel:
            return cls(raw.shape[1], 1.0, tuple(mean.tolist()), tuple(std.tolist()))
        return cls(raw.shape[1], 1.0 / float(std))

    def apply(self, raw: Tensor) -> Tensor:
        """z_raw → z, [B, C, h, w]."""
        mean, factor = self._tensors(raw)
        return (raw - mean) * factor

    def invert(self, z: Tensor) -> Tensor:
        """z → z_raw, [B, C, h, w]."""
        mean, factor = self._tensors(z)
        return z / factor + mean

    def _tensors(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if self.mean is None or self.std is None:
            return self.shift, self.factor
        std = like.new_tensor(self.std).view(1, -1, 1, 1)
        return like.new_tensor(self.mean).view(1, -1, 1, 1), self.factor / std
