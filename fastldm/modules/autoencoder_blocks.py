"""The convolutional encoder and decoder of the first stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastldm.errors import ConfigError
from fastldm.modules.activations import get_activation, group_norm
from fastldm.modules.attention import Attention
from fastldm.modules.linear_attention import LinearAttention
from fastldm.modules.resnet import ResnetBlock2D
from fastldm.modules.sampling import Downsample2D, Upsample2D
from fastldm.modules.spatial_norm import SpatialAttention, SpatialNorm, SpatialResnetBlock2D

_EPS = 1e-6

_DOWN_BLOCK_ATTENTION = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP_BLOCK_ATTENTION = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


ATTENTION_TYPES = ("default", "linear")


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of an encoder or a decoder share.

    Attributes:
        num_groups: groups of every GroupNorm.
        act_fn: activation of the residual blocks.
        zq_channels: channels of the latent that modulates the norms; None: they are GroupNorms.
        dropout: in the residual blocks.
        attention_type: "default", or "linear" (`LinearAttention`).
        resample_with_conv: a convolution where the resolution changes; else average pooling and
            repetition alone.
    """

    num_groups: int
    act_fn: str = "silu"
    zq_channels: int | None = None
    dropout: float = 0.0
    attention_type: str = "default"
    resample_with_conv: bool = True

    def __post_init__(self) -> None:
        if self.attention_type not in ATTENTION_TYPES:
            raise ConfigError(
                f"attention_type: expected {' or '.join(map(repr, ATTENTION_TYPES))}, "
                f"got {self.attention_type!r}"
            )
        if self.zq_channels is not None and (self.dropout or self.attention_type != "default"):
            raise ConfigError(
                "norm_type: the spatial norm goes with dropout 0 and attention_type 'default', "
                f"got {self.dropout} and {self.attention_type!r}"
            )

    def resnet(self, in_channels: int, out_channels: int) -> nn.Module:
        """A residual block."""
        if self.zq_channels is not None:
            return SpatialResnetBlock2D(in_channels, out_channels, self.zq_channels, self.act_fn)
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            dropout=self.dropout,
            temb_channels=None,
            groups=self.num_groups,
            eps=_EPS,
            non_linearity=self.act_fn,
        )

    def attention(self, channels: int) -> nn.Module:
        """Attention of one head over all channels."""
        if self.attention_type == "linear":
            return LinearAttention(channels)
        if self.zq_channels is not None:
            return SpatialAttention(channels, self.zq_channels)
        return Attention(
            channels,
            heads=1,
            dim_head=channels,
            bias=True,
            norm_num_groups=self.num_groups,
            eps=_EPS,
            residual_connection=True,
        )


class _Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where `attention` says so.

    With `zq_channels` the norms are `SpatialNorm`s, and the forward pass takes the latent.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        options: BlockOptions,
        attention: bool,
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nn.ModuleList(options.resnet(channels, out_channels) for channels in inputs)
        self.attentions: nn.ModuleList | None = None
        if attention:
            self.attentions = nn.ModuleList(
                options.attention(out_channels) for _ in range(num_layers)
            )

    def forward(self, hidden_states: Tensor, zq: Tensor | None = None) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states, zq)
            if self.attentions is not None:
                hidden_states = self.attentions[i](hidden_states, zq)
        return hidden_states


class DownEncoderBlock2D(_Level):
    """One level of the encoder: [B, in_channels, H, W] → [B, out_channels, H/2, W/2].

    Without `add_downsample` the size stays. With `attention` it is diffusers'
    ``AttnDownEncoderBlock2D``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        options: BlockOptions,
        attention: bool = False,
        add_downsample: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, options, attention)
        self.downsamplers: nn.ModuleList | None = None
        if add_downsample:
            with_conv = options.resample_with_conv
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, with_conv, padding=0)])

    def forward(self, hidden_states: Tensor, zq: Tensor | None = None) -> Tensor:
        hidden_states = super().forward(hidden_states, zq)
        if self.downsamplers is not None:
            hidden_states = self.downsamplers[0](hidden_states)
        return hidden_states


class UpDecoderBlock2D(_Level):
    """One level of the decoder: [B, in_channels, H, W] → [B, out_channels, 2H, 2W].

    Without `add_upsample` the size stays. With `attention` it is diffusers'
    ``AttnUpDecoderBlock2D``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        options: BlockOptions,
        attention: bool = False,
        add_upsample: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, options, attention)
        self.upsamplers: nn.ModuleList | None = None
        if add_upsample:
            with_conv = options.resample_with_conv
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels, with_conv)])

    def forward(self, hidden_states: Tensor, zq: Tensor | None = None) -> Tensor:
        hidden_states = super().forward(hidden_states, zq)
        if self.upsamplers is not None:
            hidden_states = self.upsamplers[0](hidden_states)
        return hidden_states


class AutoencoderMidBlock2D(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution."""

    def __init__(self, channels: int, options: BlockOptions, add_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(options.resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([options.attention(channels)] if add_attention else [])

    def forward(self, hidden_states: Tensor, zq: Tensor | None = None) -> Tensor:
        hidden_states = self.resnets[0](hidden_states, zq)
        for attention in self.attentions:
            hidden_states = attention(hidden_states, zq)
        return self.resnets[1](hidden_states, zq)


class Encoder(nn.Module):
    """Images to latents or to the parameters of their posterior.

    Args:
        in_channels: channels of the images.
        out_channels: channels of the latents.
        down_block_types: "DownEncoderBlock2D" or "AttnDownEncoderBlock2D" for each level.
        block_out_channels: channels of each level; f = 2^(levels − 1).
        layers_per_block: residual blocks a level.
        norm_num_groups: groups of every GroupNorm.
        act_fn: activation, see `fastldm.modules.activations.get_activation`.
        double_z: give mean and log-variance, 2·out_channels.
        mid_block_add_attention: whether the middle block has attention.
        dropout, attention_type, resample_with_conv: see `BlockOptions`.

    Raises:
        ConfigError: a block type is unknown, or the lists differ in length.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        down_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        double_z: bool = True,
        mid_block_add_attention: bool = True,
        dropout: float = 0.0,
        attention_type: str = "default",
        resample_with_conv: bool = True,
    ) -> None:
        super().__init__()
        options = BlockOptions(
            norm_num_groups,
            act_fn,
            dropout=dropout,
            attention_type=attention_type,
            resample_with_conv=resample_with_conv,
        )
        _check_levels(
            "down_block_types", down_block_types, block_out_channels, _DOWN_BLOCK_ATTENTION
        )
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        inputs = [first, *block_out_channels[:-1]]
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(
                level_in,
                level_out,
                layers_per_block,
                options,
                attention=_DOWN_BLOCK_ATTENTION[block_type],
                add_downsample=i < len(block_out_channels) - 1,
            )
            for i, (block_type, level_in, level_out) in enumerate(
                zip(down_block_types, inputs, block_out_channels, strict=True)
            )
        )
        self.mid_block = AutoencoderMidBlock2D(last, options, mid_block_add_attention)
        # The output activation is SiLU whatever act_fn is, as in diffusers.
        self.conv_norm_out = group_norm(last, norm_num_groups, _EPS)
        self.conv_act = get_activation("silu")
        self.conv_out = nn.Conv2d(
            last, 2 * out_channels if double_z else out_channels, 3, padding=1
        )
        self.gradient_checkpointing = False

    def forward(self, sample: Tensor) -> Tensor:
        """[B, in_channels, H, W] → [B, out_channels (twice with double_z), H/f, W/f]."""
        sample = self.conv_in(sample)
        for block in (*self.down_blocks, self.mid_block):
            sample = _run_block(block, sample, None, self.gradient_checkpointing)
        sample = self.conv_norm_out(sample, self.conv_act)
        return self.conv_out(sample)


class Decoder(nn.Module):
    """Latents to images; the arguments mirror `Encoder`'s.

    Args:
        up_block_types: "UpDecoderBlock2D" or "AttnUpDecoderBlock2D" for each level, from the
            lowest resolution to the highest.
        block_out_channels: channels of each level, from the highest resolution to the lowest.
        layers_per_block: residual blocks a level, less one.
        spatial_norm: MoVQ's norms, which the quantised latent modulates, in place of GroupNorms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        up_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        spatial_norm: bool = False,
        dropout: float = 0.0,
        attention_type: str = "default",
        resample_with_conv: bool = True,
    ) -> None:
        super().__init__()
        zq_channels = in_channels if spatial_norm else None
        options = BlockOptions(
            norm_num_groups, act_fn, zq_channels, dropout, attention_type, resample_with_conv
        )
        _check_levels("up_block_types", up_block_types, block_out_channels, _UP_BLOCK_ATTENTION)
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, last, 3, padding=1)
        self.mid_block = AutoencoderMidBlock2D(last, options, mid_block_add_attention)
        outputs = list(reversed(block_out_channels))
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(
                level_in,
                level_out,
                layers_per_block + 1,
                options,
                attention=_UP_BLOCK_ATTENTION[block_type],
                add_upsample=i < len(outputs) - 1,
            )
            for i, (block_type, level_in, level_out) in enumerate(
                zip(up_block_types, [last, *outputs[:-1]], outputs, strict=True)
            )
        )
        self.conv_norm_out: nn.GroupNorm | SpatialNorm = (
            SpatialNorm(first, zq_channels)
            if zq_channels is not None
            else group_norm(first, norm_num_groups, _EPS)
        )
        self.conv_act = get_activation("silu")
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, sample: Tensor, zq: Tensor | None = None) -> Tensor:
        """[B, in_channels, h, w] → [B, out_channels, f·h, f·w].

        Args:
            zq: with `spatial_norm`: the quantised latent, [B, in_channels, h, w].
        """
        sample = self.conv_in(sample)
        for block in (self.mid_block, *self.up_blocks):
            sample = _run_block(block, sample, zq, self.gradient_checkpointing)
        if isinstance(self.conv_norm_out, SpatialNorm):
            sample = self.conv_act(self.conv_norm_out(sample, zq))
        else:
            sample = self.conv_norm_out(sample, self.conv_act)
        return self.conv_out(sample)


def _run_block(
    block: nn.Module, sample: Tensor, zq: Tensor | None, gradient_checkpointing: bool
) -> Tensor:
    if gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, sample, zq, use_reentrant=False)
    return block(sample, zq)


def _check_levels(
    field: str, types: Sequence[str], channels: Sequence[int], known: Mapping[str, bool]
) -> None:
    if not channels or len(types) != len(channels):
        raise ConfigError(
            f"{field}: {len(types)} block types for {len(channels)} block_out_channels"
        )
    for block_type in types:
        if block_type not in known:
            raise ConfigError(f"{field}: expected {' or '.join(known)}, got {block_type!r}")
