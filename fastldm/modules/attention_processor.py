"""Exchangeable computations of an attention, as diffusers has them: IP-Adapters, users' own.

A processor is called with the attention itself, ``(attn, hidden_states, encoder_hidden_states=…,
attention_mask=…)``, and gives the attention's output. `AttentionInterface` is what processors
written for diffusers expect to find on the attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Processor = Callable[..., Tensor]

_MASKED = -10000.0

_PLAIN_NAMES = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    }
)


class AttnProcessor:
    """Attention on fastldm's operators; what every attention begins with."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The output of `attn`; see the forward pass of `fastldm.modules.attention.Attention`."""
        return attn.attend(hidden_states, encoder_hidden_states, attention_mask)


def is_plain(processor: Processor) -> bool:
    """Whether `processor` computes nothing but the attention: ours, or such a one of diffusers'.

    All of diffusers' have the same result as our own, which therefore stands in for them.
    """
    kind = type(processor)
    return kind is AttnProcessor or (
        kind.__name__ in _PLAIN_NAMES and kind.__module__.startswith("diffusers.")
    )


def accepted_arguments(processor: Processor) -> frozenset[str]:
    """Names of what `processor` takes beyond the attention, the two states and the mask."""
    function: Processor = processor
    if isinstance(processor, nn.Module) and type(processor).__call__ is nn.Module.__call__:
        function = processor.forward
    names = frozenset(inspect.signature(function).parameters)
    return names - {"attn", "hidden_states", "encoder_hidden_states", "attention_mask"}


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask [B, Lk] as diffusers' processors take it: [B, 1, Lk], to be added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    bias = torch.where(mask, 0.0, _MASKED).to(dtype)
    return bias[:, None] if bias.ndim == 2 else bias


class AttentionInterface(nn.Module):
    """What processors written for diffusers read and call on an attention.

    Attributes whose value never differs here are those of features that only other families of
    models have.
    """

    heads: int
    dim_head: int
    scale: float
    upcast_attention: bool
    processor: Processor
    processor_arguments: frozenset[str]
    """Keywords that the processor takes."""
    spatial_norm: Any

    added_kv_proj_dim: int | None = None
    fused_projections = False
    is_causal = False
    norm_cross: nn.Module | None = None
    only_cross_attention = False
    upcast_softmax = False

    @property
    def inner_dim(self) -> int:
        """Width of the queries, keys and values of all heads."""
        return self.heads * self.dim_head

    inner_kv_dim = inner_dim

    def get_processor(self) -> Processor:
        """What computes this attention."""
        return self.processor

    def set_processor(self, processor: Processor) -> None:
        """Let `processor` compute this attention; a module's weights become part of the model."""
        self._modules.pop("processor", None)
        self.processor = processor
        self._is_plain = is_plain(processor)
        self.processor_arguments = frozenset() if self._is_plain else accepted_arguments(processor)

    def _process(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        attention_mask: Tensor | None,
        keywords: Mapping[str, Any],
    ) -> Tensor:
        """What a processor that is not our own gives, with those of `keywords` that it takes."""
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=additive_mask(attention_mask, hidden_states.dtype),
            **{name: value for name, value in keywords.items() if name in self.processor_arguments},
        )

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """[B, L, heads·d] → [B·heads, L, d], or [B, heads, L, d] with `out_dim` 4."""
        if tensor.ndim == 4:
            tensor = tensor.flatten(1, 2)
        tensor = tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return tensor.flatten(0, 1) if out_dim == 3 else tensor

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """[B·heads, L, d] → [B, L, heads·d]."""
        return tensor.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attention weights of [B·heads, L, d] queries and keys: [B·heads, Lq, Lk]."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        scores = self.scale * (query @ key.transpose(-1, -2))
        if attention_mask is not None:
            scores = scores + attention_mask
        return scores.softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self,
        attention_mask: Tensor | None,
        target_length: int,
        batch_size: int,
        out_dim: int = 3,
    ) -> Tensor | None:
        """A mask [B, 1, Lk] for each head: [B·heads, 1, Lk], or [B, heads, 1, Lk].

        As in diffusers, one of another length than `target_length` is padded by that many zeros.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length), value=0.0)
        if out_dim == 4:
            return attention_mask[:, None].repeat_interleave(self.heads, dim=1)
        if attention_mask.shape[0] < batch_size * self.heads:
            attention_mask = attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask
