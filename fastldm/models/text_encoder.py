"""The paper's text encoder: a BERT-like transformer, trained together with the UNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError, DataError
from fastldm.models.base import ModelMixin
from fastldm.outputs import BaseOutput

_EMBEDDING_STD = 0.02


@dataclass
class TextEncoderOutput(BaseOutput):
    """What a text encoder gives.

    Attributes:
        last_hidden_state: [B, L, hidden_size], one vector a token, not pooled.
    """

    last_hidden_state: Tensor


class SelfAttention(nn.Module):
    """Multi-head self-attention, without biases on queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner_size = num_heads * head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.out_proj = nn.Linear(inner_size, hidden_size)

    def forward(self, hidden_states: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B, L, hidden_size], bool [B, L] with True = attend → [B, L, hidden_size]."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if key_mask is None else key_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward net with exact GELU, each after a LayerNorm and added."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(hidden_size, num_heads, head_dim)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.final_layer_norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B, L, hidden_size] → the same."""
        attended = self.self_attn(self.self_attn_layer_norm(hidden_states), key_mask)
        hidden_states = hidden_states + self.dropout(attended)
        inner = F.gelu(self.fc1(self.final_layer_norm(hidden_states)))
        return hidden_states + self.dropout(self.fc2(inner))


class Encoder(nn.Module):
    """Token and position embeddings, the layers, and a last LayerNorm."""

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.embed_positions = nn.Embedding(max_length, hidden_size)
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_size, num_heads, head_dim, intermediate_size, dropout)
            for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embed_tokens.weight, std=_EMBEDDING_STD)
        nn.init.normal_(self.embed_positions.weight, std=_EMBEDDING_STD)

    def forward(self, input_ids: Tensor, key_mask: Tensor | None) -> Tensor:
        """int64 [B, L], bool [B, L] → [B, L, hidden_size]."""
        positions = self.embed_positions.weight[: input_ids.shape[1]]
        hidden_states = self.dropout(self.embed_tokens(input_ids) + positions)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = checkpoint(layer, hidden_states, key_mask, use_reentrant=False)
            else:
                hidden_states = layer(hidden_states, key_mask)
        return self.layer_norm(hidden_states)


class TextEncoder(ModelMixin):
    """A bidirectional transformer over the tokens of a caption (paper, appendix E.2.1).

    It is CompVis's ``BERTEmbedder``, with the state-dict keys that diffusers gave it
    (``LDMBertModel``). The defaults are those of the 1.45B text-to-image model.

    Args:
        vocab_size: number of tokens.
        max_length: the most tokens of a caption.
        hidden_size: width of the output, the UNet's ``cross_attention_dim``.
        num_layers: number of layers.
        num_heads, head_dim: attention heads and the width of each.
        intermediate_size: inner width of the feed-forward nets; 4·`hidden_size` if None.
        dropout: on the embeddings and after each part of a layer.
        use_attention_mask: leave padding tokens out of the attention, here and (in
            `LatentDiffusion`) in the UNet. CompVis's models attend to them.
        with_logits_head: have the head on the vocabulary that the published checkpoints carry;
            nothing uses it.

    Raises:
        ConfigError: a size is not positive.
    """

    weights_name = "model.safetensors"

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 30522,
        max_length: int = 77,
        hidden_size: int = 1280,
        num_layers: int = 32,
        num_heads: int = 8,
        head_dim: int = 64,
        intermediate_size: int | None = None,
        dropout: float = 0.0,
        use_attention_mask: bool = False,
        with_logits_head: bool = False,
    ) -> None:
        super().__init__()
        intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        sizes = {
            "vocab_size": vocab_size,
            "max_length": max_length,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "intermediate_size": intermediate_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        self.max_length = max_length
        self.use_attention_mask = use_attention_mask
        self.model = Encoder(**sizes, dropout=dropout)
        self.to_logits = nn.Linear(hidden_size, vocab_size) if with_logits_head else None
        if self.to_logits is not None:
            self.to_logits.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextEncoderOutput:
        """
        Args:
            input_ids: integers [B, L], L at most `max_length`.
            attention_mask: [B, L], 1 or True for a token and 0 for padding; has an effect only
                with `use_attention_mask`.

        Returns:
            ``last_hidden_state`` [B, L, hidden_size].

        Raises:
            DataError: the ids have another shape, or are more than `max_length`.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] > self.max_length:
            raise DataError(
                f"input_ids: expected [B, L] with L ≤ {self.max_length} (max_length), got "
                f"{list(input_ids.shape)}"
            )
        key_mask = None
        if self.use_attention_mask and attention_mask is not None:
            key_mask = attention_mask.to(torch.bool)
        return TextEncoderOutput(self.model(input_ids, key_mask))
