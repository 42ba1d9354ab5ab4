"""Multi-head attention over the pixels of a feature map, or from them to a context."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError
from fastldm.modules.activations import group_norm
from fastldm.modules.attention_processor import AttentionInterface, AttnProcessor


class Attention(AttentionInterface):
    """Self-attention, or cross-attention to ``encoder_hidden_states``.

    Args:
        query_dim: channels of the input and output.
        cross_attention_dim: channels of the context, `query_dim` if None.
        heads, dim_head: number of heads and channels of each.
        dropout: probability of dropout on the output.
        bias: whether the projections to queries, keys and values have biases.
        upcast_attention: compute the attention itself in float32.
        qk_norm: None, "layer_norm" or "rms_norm" over each head's queries and keys.
        norm_num_groups: groups of a GroupNorm on the input; None: no norm.
        out_bias: whether the output projection has a bias.
        scale_qk: multiply the scores by dim_head^−½.
        eps: of the norms.
        rescale_output_factor: the output is divided by it.
        residual_connection: add the input to the output.

    Raises:
        ConfigError: `qk_norm` is none of the above, or channels and groups disagree.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        upcast_attention: bool = False,
        qk_norm: str | None = None,
        norm_num_groups: int | None = None,
        out_bias: bool = True,
        scale_qk: bool = True,
        eps: float = 1e-5,
        rescale_output_factor: float = 1.0,
        residual_connection: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.scale = dim_head**-0.5 if scale_qk else 1.0
        self.upcast_attention = upcast_attention
        self.rescale_output_factor = rescale_output_factor
        self.residual_connection = residual_connection
        self.is_cross_attention = cross_attention_dim is not None
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.cross_attention_dim = context_dim

        self.group_norm = (
            None if norm_num_groups is None else group_norm(query_dim, norm_num_groups, eps)
        )
        self.norm_q = _head_norm(qk_norm, dim_head, eps)
        self.norm_k = _head_norm(qk_norm, dim_head, eps)
        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=bias)
        self.to_k = nn.Linear(context_dim, self.inner_dim, bias=bias)
        self.to_v = nn.Linear(context_dim, self.inner_dim, bias=bias)
        self.to_out = nn.ModuleList(
            [nn.Linear(self.inner_dim, query_dim, bias=out_bias), nn.Dropout(dropout)]
        )
        self.spatial_norm = None
        self.set_processor(AttnProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """
        Args:
            hidden_states: [B, Lq, query_dim] or [B, query_dim, H, W].
            encoder_hidden_states: [B, Lk, cross_attention_dim]; None: attend to the input. An
                IP-Adapter's processor takes a tuple of it and the images' features.
            attention_mask: bool [B, Lk] with True = attend; or a mask that torch's
                scaled_dot_product_attention takes, [B, Lq or 1, Lk] or [B, heads or 1, Lq or 1, Lk]
                (bool, or floating and added to the scores).
            cross_attention_kwargs: for the processor, where it takes them.

        Returns:
            The shape of `hidden_states`.
        """
        if not self._is_plain:
            return self._process(
                hidden_states, encoder_hidden_states, attention_mask, cross_attention_kwargs
            )
        return self.attend(hidden_states, encoder_hidden_states, attention_mask)

    def attend(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The forward pass on fastldm's operators, whatever the processor is."""
        residual = hidden_states
        if self.group_norm is not None:
            channels_first = hidden_states.ndim == 4
            if not channels_first:
                hidden_states = hidden_states.transpose(1, 2)
            hidden_states = self.group_norm(hidden_states)
            if not channels_first:
                hidden_states = hidden_states.transpose(1, 2)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = self.to_q(hidden_states).unflatten(-1, (self.heads, self.dim_head))
        key = self.to_k(context).unflatten(-1, (self.heads, self.dim_head))
        value = self.to_v(context).unflatten(-1, (self.heads, self.dim_head))
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)

        to_context = encoder_hidden_states is not None
        output = self._attend(query, key, value, attention_mask, to_context).flatten(2)
        for layer in self.to_out:
            output = layer(output)
        if residual.ndim == 4:
            output = output.transpose(1, 2).unflatten(2, residual.shape[2:])
        if self.residual_connection:
            # The first operand gives the sum its memory format.
            output = residual + output
        return output if self.rescale_output_factor == 1.0 else output / self.rescale_output_factor

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, to_context: bool
    ) -> Tensor:
        """Attention of [B, L, heads, dim_head] operands, in the dtype of `query`."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key, value = query.float(), key.float(), value.float()
        key_mask = mask if mask is not None and mask.ndim == 2 else None
        if key_mask is not None and key_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask: [B, Lk] must be bool, got {key_mask.dtype}")
        # On a CPU the operator is faster for many keys, too; elsewhere it is made for few.
        is_fast = to_context or query.device.type == "cpu"
        if is_fast and (mask is None or key_mask is not None):
            output = ops.cross_attention(query, key, value, scale=self.scale, key_mask=key_mask)
            return output.to(dtype)
        if key_mask is not None:
            mask = key_mask[:, None, None, :]
        elif mask is not None:
            mask = mask[:, None] if mask.ndim == 3 else mask
            mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            scale=self.scale,
        )
        return output.transpose(1, 2).to(dtype)


def _head_norm(kind: str | None, dim_head: int, eps: float) -> nn.Module | None:
    if kind is None:
        return None
    if kind == "layer_norm":
        return nn.LayerNorm(dim_head, eps=eps)
    if kind == "rms_norm":
        return nn.RMSNorm(dim_head, eps=eps)
    raise ConfigError(f"qk_norm: expected None, 'layer_norm' or 'rms_norm', got {kind!r}")
