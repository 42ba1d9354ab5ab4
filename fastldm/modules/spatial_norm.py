"""Blocks whose norms are scaled and shifted by the quantised latent: MoVQ's decoder.

Zheng et al., MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation,
https://arxiv.org/abs/2209.09002.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.modules.activations import get_activation, group_norm
from fastldm.modules.attention import Attention

_NUM_GROUPS = 32
_EPS = 1e-6


class SpatialNorm(nn.Module):
    """GroupNorm of 32 groups, then at each pixel a scale and a shift that the latent decides.

    Args:
        channels: of the feature map.
        zq_channels: of the latent.

    Raises:
        ConfigError: 32 does not divide `channels`.
    """

    def __init__(self, channels: int, zq_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels, _NUM_GROUPS, _EPS)
        self.conv_y = nn.Conv2d(zq_channels, channels, 1)
        self.conv_b = nn.Conv2d(zq_channels, channels, 1)

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        """x [B, channels, H, W] and zq [B, zq_channels, h, w], enlarged to its nearest pixels."""
        # A 1×1 convolution commutes with the enlargement and costs less before it.
        scale = F.interpolate(self.conv_y(zq), size=x.shape[2:], mode="nearest")
        shift = F.interpolate(self.conv_b(zq), size=x.shape[2:], mode="nearest")
        return self.norm_layer(x) * scale + shift


class SpatialResnetBlock2D(nn.Module):
    """`ResnetBlock2D` with `SpatialNorm`s and no time embedding.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        zq_channels: channels of the latent.
        non_linearity: activation, see `fastldm.modules.activations.get_activation`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, zq_channels: int, non_linearity: str
    ) -> None:
        super().__init__()
        self.nonlinearity = get_activation(non_linearity)
        self.norm1 = SpatialNorm(in_channels, zq_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = SpatialNorm(out_channels, zq_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, hidden_states: Tensor, zq: Tensor) -> Tensor:
        """[B, in_channels, H, W] → [B, out_channels, H, W]."""
        residual = hidden_states
        hidden_states = self.conv1(self.nonlinearity(self.norm1(hidden_states, zq)))
        hidden_states = self.conv2(self.nonlinearity(self.norm2(hidden_states, zq)))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return residual + hidden_states


class SpatialAttention(Attention):
    """Self-attention of one head over the pixels, after a `SpatialNorm`, added to the input.

    Args:
        channels: of the feature map.
        zq_channels: of the latent.
    """

    def __init__(self, channels: int, zq_channels: int) -> None:
        super().__init__(channels, heads=1, dim_head=channels, bias=True)
        self.spatial_norm: SpatialNorm = SpatialNorm(channels, zq_channels)

    def forward(self, hidden_states: Tensor, zq: Tensor) -> Tensor:  # type: ignore[override]
        """[B, channels, H, W] → the same."""
        return hidden_states + super().forward(self.spatial_norm(hidden_states, zq))
