"""An image-like condition, such as a semantic map, at the size of the latents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError, DataError
from fastldm.models.base import ModelMixin

RESCALING_METHODS = ("nearest", "bilinear", "bicubic", "area")


class SpatialRescaler(ModelMixin):
    """Repeated interpolation, then a 1×1 convolution: what the paper's semantic synthesis appends
    to the latents (appendix E.2.2).

    Args:
        num_stages: how often the size is multiplied.
        method: "nearest", "bilinear", "bicubic" or "area", as of `torch.nn.functional.interpolate`.
        multiplier: of height and width, each time.
        in_channels: channels of the condition, such as the classes of a one-hot map.
        out_channels: channels after the convolution; None: there is no convolution.
        bias: whether the convolution has one.

    Raises:
        ConfigError: an argument has a value that is not listed.
    """

    @register_to_config
    def __init__(
        self,
        num_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if method not in RESCALING_METHODS:
            raise ConfigError(
                f"method: expected one of {', '.join(RESCALING_METHODS)}, got {method!r}"
            )
        for name, value, accepted, wanted in (
            ("num_stages", num_stages, num_stages >= 0, "0 or more"),
            ("multiplier", multiplier, multiplier > 0, "a number above 0"),
            ("in_channels", in_channels, in_channels > 0, "at least 1"),
            ("out_channels", out_channels, out_channels is None or out_channels > 0, "at least 1"),
        ):
            if not accepted:
                raise ConfigError(f"{name}: expected {wanted}, got {value}")
        self._in_channels = in_channels
        self._stages = (num_stages, float(multiplier), method)
        self.channel_mapper = (
            None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        )

    def forward(self, condition: Tensor) -> Tensor:
        """
        Args:
            condition: [B, in_channels, H, W].

        Returns:
            [B, out_channels (or in_channels), H·multiplierⁿ, W·multiplierⁿ], n = `num_stages`.

        Raises:
            DataError: the condition has another shape.
        """
        if condition.ndim != 4 or condition.shape[1] != self._in_channels:
            raise DataError(
                f"condition: expected [B, {self._in_channels}, H, W], got {list(condition.shape)}"
            )
        stages, multiplier, method = self._stages
        for _ in range(stages):
            condition = F.interpolate(condition, scale_factor=multiplier, mode=method)
        return condition if self.channel_mapper is None else self.channel_mapper(condition)
