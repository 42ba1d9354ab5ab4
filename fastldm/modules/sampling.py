"""Resolution changes by a factor of two."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import ConfigError


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, then an optional 3×3 convolution.

    Args:
        channels: channels of the input.
        use_conv: whether the convolution is there.
        out_channels: channels of the output, `channels` if None; differs only with `use_conv`.
    """

    def __init__(
        self, channels: int, use_conv: bool = False, out_channels: int | None = None
    ) -> None:
        super().__init__()
        out_channels = _checked_out_channels(channels, use_conv, out_channels)
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1) if use_conv else None

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, H, W] → [B, C', 2H, 2W], or to `output_size` where given (an odd size)."""
        if output_size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        return hidden_states if self.conv is None else self.conv(hidden_states)


class Downsample2D(nn.Module):
    """A 3×3 convolution of stride 2, or average pooling without weights.

    Args:
        channels: channels of the input.
        use_conv: convolve; else pool.
        out_channels: channels of the output, `channels` if None; differs only with `use_conv`.
        padding: 1 pads every side; 0 pads one row below and one column to the right, as the
            autoencoders of latent diffusion do.
    """

    def __init__(
        self,
        channels: int,
        use_conv: bool = False,
        out_channels: int | None = None,
        padding: int = 1,
    ) -> None:
        super().__init__()
        out_channels = _checked_out_channels(channels, use_conv, out_channels)
        self.pad_end = use_conv and padding == 0
        self.conv: nn.Module
        if use_conv:
            self.conv = nn.Conv2d(channels, out_channels, 3, stride=2, padding=padding)
        else:
            self.conv = nn.AvgPool2d(2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H/2, W/2]; of an odd size, padding 1 rounds up, the rest down."""
        if self.pad_end:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


def _checked_out_channels(channels: int, use_conv: bool, out_channels: int | None) -> int:
    if out_channels is None or out_channels == channels:
        return channels
    if not use_conv:
        raise ConfigError(
            f"out_channels: resampling without a convolution keeps {channels} channels, "
            f"got {out_channels}"
        )
    return out_channels
