"""The levels of a UNet: residual blocks, attention after each of them, and a change of resolution.

A level is the same class whatever it holds; its parts have diffusers' names: ``resnets``,
``attentions``, ``downsamplers`` or ``upsamplers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastldm.errors import ConfigError
from fastldm.modules.attention import Attention
from fastldm.modules.freeu import FreeU
from fastldm.modules.resnet import ResnetBlock2D
from fastldm.modules.sampling import Downsample2D, Upsample2D
from fastldm.modules.transformer import Transformer2DModel


@dataclass(frozen=True)
class ResnetOptions:
    """What the residual blocks of a UNet share; the fields are those of `ResnetBlock2D`."""

    temb_channels: int
    groups: int = 32
    eps: float = 1e-5
    non_linearity: str = "silu"
    dropout: float = 0.0
    time_embedding_norm: str = "default"
    output_scale_factor: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int):
            raise ConfigError(f"norm_num_groups: expected a positive int, got {self.groups!r}")

    def build(
        self, in_channels: int, out_channels: int, *, up: bool = False, down: bool = False
    ) -> ResnetBlock2D:
        """A residual block with these options."""
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_channels,
            groups=self.groups,
            eps=self.eps,
            non_linearity=self.non_linearity,
            dropout=self.dropout,
            time_embedding_norm=self.time_embedding_norm,
            output_scale_factor=self.output_scale_factor,
            up=up,
            down=down,
        )


@dataclass(frozen=True)
class PlainAttentionOptions:
    """Self-attention between pixels.

    Attributes:
        head_dim: channels a head; None: one head over all channels.
        groups: groups of the norm before it; None: no norm.
        eps: of that norm.
        num_heads: number of heads, in place of `head_dim`.
        output_scale_factor: the sum with the input is divided by it.
    """

    head_dim: int | None
    groups: int | None
    eps: float = 1e-5
    num_heads: int | None = None
    output_scale_factor: float = 1.0

    def build(self, channels: int, layer: int) -> Attention:
        """The attention after the residual block number `layer`."""
        heads = self._heads(channels)
        return Attention(
            channels,
            heads=heads,
            dim_head=channels // heads,
            bias=True,
            norm_num_groups=self.groups,
            eps=self.eps,
            rescale_output_factor=self.output_scale_factor,
            residual_connection=True,
        )

    def _heads(self, channels: int) -> int:
        if self.num_heads is not None:
            if self.num_heads < 1 or channels % self.num_heads:
                raise ConfigError(
                    f"num_attention_heads: {self.num_heads} heads do not divide {channels} channels"
                )
            return self.num_heads
        if self.head_dim is None:
            return 1
        if self.head_dim < 1 or channels % self.head_dim:
            raise ConfigError(
                f"attention_head_dim: {channels} channels do not divide into heads of "
                f"{self.head_dim}"
            )
        return channels // self.head_dim


@dataclass(frozen=True)
class TransformerOptions:
    """Transformer blocks with cross-attention.

    Attributes:
        num_heads: heads of every attention.
        cross_attention_dim: width of the context.
        num_layers: transformer blocks after each residual block of the level.
        groups: groups of the norm before them.
        use_linear_projection, only_cross_attention, upcast_attention: see `Transformer2DModel`.
    """

    num_heads: int
    cross_attention_dim: int
    num_layers: Sequence[int]
    groups: int
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    upcast_attention: bool = False

    def build(self, channels: int, layer: int) -> Transformer2DModel:
        """The transformer after the residual block number `layer`."""
        if not 1 <= self.num_heads <= channels:
            raise ConfigError(
                f"attention_head_dim: {self.num_heads} heads cannot share {channels} channels"
            )
        return Transformer2DModel(
            self.num_heads,
            channels // self.num_heads,
            channels,
            self.cross_attention_dim,
            num_layers=self.num_layers[layer],
            norm_num_groups=self.groups,
            use_linear_projection=self.use_linear_projection,
            only_cross_attention=self.only_cross_attention,
            upcast_attention=self.upcast_attention,
        )


AttentionOptions = PlainAttentionOptions | TransformerOptions


class Context(NamedTuple):
    """What transformers attend to."""

    hidden_states: Any
    """[B, Lk, cross_attention_dim]; with an IP-Adapter, a tuple of it and the images' features."""
    mask: Tensor | None = None
    """bool [B, Lk] with True = attend."""
    self_mask: Tensor | None = None
    """The same over the keys of the first attention of each transformer block."""
    keywords: Mapping[str, Any] | None = None
    """For the attentions' processors."""


class _Level(nn.Module):
    """Residual blocks, each followed by attention where `attention` is given."""

    def __init__(
        self,
        channels: Sequence[tuple[int, int]],
        resnet: ResnetOptions,
        attention: AttentionOptions | None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.has_cross_attention = isinstance(attention, TransformerOptions)
        self.resnets = nn.ModuleList(resnet.build(before, after) for before, after in channels)
        self.attentions: nn.ModuleList | None = None
        if attention is not None:
            self.attentions = nn.ModuleList(
                attention.build(after, layer) for layer, (_, after) in enumerate(channels)
            )

    def _layer(
        self, index: int, hidden_states: Tensor, temb: Tensor, context: Context | None
    ) -> Tensor:
        """The residual block number `index` and the attention after it."""
        hidden_states = self._run(self.resnets[index], hidden_states, temb)
        if self.attentions is None:
            return hidden_states
        return self._attend(self.attentions[index], hidden_states, context)

    def _attend(
        self, attention: nn.Module, hidden_states: Tensor, context: Context | None
    ) -> Tensor:
        if isinstance(attention, Attention):
            return self._run(attention, hidden_states)
        if context is None:
            raise ValueError("context: this level has cross-attention, got None")
        # A transformer recomputes its blocks one by one.
        return attention(
            hidden_states, context.hidden_states, context.self_mask, context.mask, context.keywords
        )

    def _run(self, module: nn.Module, *arguments: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *arguments, use_reentrant=False)
        return module(*arguments)


class UNetDownBlock2D(_Level):
    """A level on the way down.

    Args:
        in_channels: channels of its input.
        out_channels: channels of its output.
        num_layers: number of residual blocks.
        resnet, attention: options of the residual blocks, and of the attention after each.
        downsampling: "conv", "resnet", "plain" (average pooling), or None to keep the resolution.
        downsample_padding: padding of the convolution, see `Downsample2D`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        resnet: ResnetOptions,
        attention: AttentionOptions | None = None,
        downsampling: str | None = "conv",
        downsample_padding: int = 1,
    ) -> None:
        before = [in_channels] + [out_channels] * (num_layers - 1)
        super().__init__([(channels, out_channels) for channels in before], resnet, attention)
        self.downsamplers: nn.ModuleList | None = None
        if downsampling in ("conv", "plain"):
            downsampler: nn.Module = Downsample2D(
                out_channels, use_conv=downsampling == "conv", padding=downsample_padding
            )
            self.downsamplers = nn.ModuleList([downsampler])
        elif downsampling == "resnet":
            self.downsamplers = nn.ModuleList([resnet.build(out_channels, out_channels, down=True)])

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        context: Context | None = None,
        additional_residual: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """
        Args:
            hidden_states: [B, in_channels, H, W].
            temb: [B, temb_channels].
            context: for transformers.
            additional_residual: [B, out_channels, H, W], added after the last layer.

        Returns:
            The output, and everything that the way up takes: the output of each layer and, where
            the resolution changes, of the downsampler.
        """
        states: list[Tensor] = []
        for index in range(len(self.resnets)):
            hidden_states = self._layer(index, hidden_states, temb, context)
            states.append(hidden_states)
        if additional_residual is not None:
            hidden_states = hidden_states + additional_residual
            states[-1] = hidden_states
        if self.downsamplers is not None:
            for downsampler in self.downsamplers:
                if isinstance(downsampler, Downsample2D):
                    hidden_states = downsampler(hidden_states)
                else:
                    hidden_states = downsampler(hidden_states, temb)
            states.append(hidden_states)
        return hidden_states, tuple(states)


class UNetUpBlock2D(_Level):
    """A level on the way up; each layer also takes a feature map of the way down.

    Args:
        in_channels: channels of the last feature map that it takes (the next level's).
        prev_output_channel: channels of its input.
        out_channels: channels of its output and of the other feature maps.
        num_layers: number of residual blocks.
        resnet, attention: options of the residual blocks, and of the attention after each.
        upsampling: "conv", "resnet", "plain" (repetition), or None to keep the resolution.
    """

    def __init__(
        self,
        in_channels: int,
        prev_output_channel: int,
        out_channels: int,
        num_layers: int,
        resnet: ResnetOptions,
        attention: AttentionOptions | None = None,
        upsampling: str | None = "conv",
    ) -> None:
        before = [prev_output_channel] + [out_channels] * (num_layers - 1)
        skipped = [out_channels] * (num_layers - 1) + [in_channels]
        channels = [(a + b, out_channels) for a, b in zip(before, skipped, strict=True)]
        super().__init__(channels, resnet, attention)
        self.freeu: FreeU | None = None
        self.upsamplers: nn.ModuleList | None = None
        if upsampling in ("conv", "plain"):
            with_conv = upsampling == "conv"
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels, use_conv=with_conv)])
        elif upsampling == "resnet":
            self.upsamplers = nn.ModuleList([resnet.build(out_channels, out_channels, up=True)])

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor,
        context: Context | None = None,
        upsample_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: [B, prev_output_channel, H, W].
            res_hidden_states_tuple: one feature map a layer, the first layer's last.
            temb: [B, temb_channels].
            context: for transformers.
            upsample_size: of the output; None: twice the input.

        Returns:
            [B, out_channels, 2H, 2W], or H × W without upsampling.
        """
        for index, skipped in enumerate(reversed(res_hidden_states_tuple)):
            if self.freeu is not None:
                hidden_states, skipped = self.freeu(hidden_states, skipped)
            hidden_states = torch.cat([hidden_states, skipped], dim=1)
            hidden_states = self._layer(index, hidden_states, temb, context)
        if self.upsamplers is not None:
            for upsampler in self.upsamplers:
                if isinstance(upsampler, Upsample2D):
                    hidden_states = upsampler(hidden_states, upsample_size)
                else:
                    hidden_states = upsampler(hidden_states, temb)
        return hidden_states


class UNetMidBlock2D(_Level):
    """The bottom of a UNet: a residual block, attention, a residual block.

    Args:
        in_channels: channels.
        resnet: options of the residual blocks.
        attention: of the attention between them; None: none.
        num_layers: how often attention and a residual block follow the first one.
    """

    def __init__(
        self,
        in_channels: int,
        resnet: ResnetOptions,
        attention: AttentionOptions | None = None,
        num_layers: int = 1,
    ) -> None:
        super().__init__([(in_channels, in_channels)] * (num_layers + 1), resnet, None)
        self.has_cross_attention = isinstance(attention, TransformerOptions)
        if attention is not None:
            self.attentions = nn.ModuleList(
                attention.build(in_channels, layer) for layer in range(num_layers)
            )

    def forward(
        self, hidden_states: Tensor, temb: Tensor, context: Context | None = None
    ) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        hidden_states = self._run(self.resnets[0], hidden_states, temb)
        for index, resnet in enumerate(self.resnets[1:]):
            if self.attentions is not None:
                hidden_states = self._attend(self.attentions[index], hidden_states, context)
            hidden_states = self._run(resnet, hidden_states, temb)
        return hidden_states
