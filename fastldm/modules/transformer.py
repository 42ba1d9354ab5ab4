"""Transformer blocks over the pixels of a feature map, conditioned by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastldm import ops
from fastldm.modules.activations import group_norm
from fastldm.modules.attention import Attention

_GROUP_NORM_EPS = 1e-6


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., dim_in] → [..., dim_out]."""
        return ops.geglu(self.proj(hidden_states))


class FeedForward(nn.Module):
    """GEGLU to `mult` times the width, dropout, and back."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(dim, mult * dim), nn.Dropout(dropout), nn.Linear(mult * dim, dim)]
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., dim] → [..., dim]."""
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward net, each after a LayerNorm and added.

    Args:
        dim: width of the pixels' features.
        num_attention_heads, attention_head_dim: of both attentions.
        cross_attention_dim: width of the context.
        dropout: after each attention and inside the feed-forward net.
        attention_bias: biases in the projections to queries, keys and values.
        only_cross_attention: the first attention, too, is to the context.
        upcast_attention: compute the attentions in float32.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention_dim: int,
        dropout: float = 0.0,
        attention_bias: bool = False,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention

        def attention(context_dim: int | None) -> Attention:
            return Attention(
                dim,
                cross_attention_dim=context_dim,
                heads=num_attention_heads,
                dim_head=attention_head_dim,
                dropout=dropout,
                bias=attention_bias,
                upcast_attention=upcast_attention,
            )

        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = attention(cross_attention_dim if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = attention(cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout=dropout)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: [B, pixels, dim].
            encoder_hidden_states: [B, Lk, cross_attention_dim], or what the second attention's
                processor takes.
            attention_mask: bool over the keys of the first attention, True = attend.
            encoder_attention_mask: bool [B, Lk], True = attend.
            cross_attention_kwargs: for both attentions' processors.

        Returns:
            [B, pixels, dim].
        """
        keywords = cross_attention_kwargs or {}
        hidden_states = hidden_states + self.attn1(
            self.norm1(hidden_states),
            encoder_hidden_states if self.only_cross_attention else None,
            attention_mask,
            **keywords,
        )
        hidden_states = hidden_states + self.attn2(
            self.norm2(hidden_states), encoder_hidden_states, encoder_attention_mask, **keywords
        )
        return hidden_states + self.ff(self.norm3(hidden_states))


class Transformer2DModel(nn.Module):
    """Transformer blocks between two projections, added to the feature map.

    Args:
        num_attention_heads, attention_head_dim: their product is the inner width.
        in_channels: channels of the feature map.
        num_layers: number of transformer blocks.
        cross_attention_dim: width of the context.
        dropout, attention_bias, only_cross_attention, upcast_attention: of the blocks.
        norm_num_groups: groups of the GroupNorm on the input.
        use_linear_projection: the projections are linear layers, not 1×1 convolutions.

    Raises:
        ConfigError: channels and groups disagree.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        cross_attention_dim: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = False,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = num_attention_heads * attention_head_dim
        self.use_linear_projection = use_linear_projection
        self.gradient_checkpointing = False
        self.norm = group_norm(in_channels, norm_num_groups, _GROUP_NORM_EPS)
        self.proj_in: nn.Module
        self.proj_out: nn.Module
        if use_linear_projection:
            self.proj_in = nn.Linear(in_channels, inner_dim)
            self.proj_out = nn.Linear(inner_dim, in_channels)
        else:
            self.proj_in = nn.Conv2d(in_channels, inner_dim, 1)
            self.proj_out = nn.Conv2d(inner_dim, in_channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim,
                dropout=dropout,
                attention_bias=attention_bias,
                only_cross_attention=only_cross_attention,
                upcast_attention=upcast_attention,
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: [B, in_channels, H, W].
            encoder_hidden_states, cross_attention_kwargs: see `BasicTransformerBlock`.
            attention_mask: bool over the keys of each block's first attention, True = attend.
            encoder_attention_mask: bool [B, Lk], True = attend.

        Returns:
            [B, in_channels, H, W].
        """
        residual = hidden_states
        size = hidden_states.shape[2:]
        hidden_states = self.norm(hidden_states)
        if self.use_linear_projection:
            hidden_states = self.proj_in(_to_tokens(hidden_states))
        else:
            hidden_states = _to_tokens(self.proj_in(hidden_states))
        for block in self.transformer_blocks:
            arguments = (
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                encoder_attention_mask,
                cross_attention_kwargs,
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = checkpoint(block, *arguments, use_reentrant=False)
            else:
                hidden_states = block(*arguments)
        if self.use_linear_projection:
            hidden_states = _to_pixels(self.proj_out(hidden_states), size)
        else:
            hidden_states = self.proj_out(_to_pixels(hidden_states, size))
        # The first operand gives the sum its memory format.
        return residual + hidden_states


def _to_tokens(hidden_states: Tensor) -> Tensor:
    """[B, C, H, W] → contiguous [B, H·W, C]; a view of a channels_last input."""
    return hidden_states.flatten(2).transpose(1, 2).contiguous()


def _to_pixels(hidden_states: Tensor, size: torch.Size) -> Tensor:
    """[B, H·W, C] → [B, C, H, W], a view in channels_last."""
    return hidden_states.transpose(1, 2).unflatten(2, size)
