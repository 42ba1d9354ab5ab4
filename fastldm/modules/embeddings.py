"""Embeddings of time steps, noise levels and pooled text, which every residual block receives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import ConfigError
from fastldm.modules.activations import get_activation


def get_timestep_embedding(
    timesteps: Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> Tensor:
    """Sinusoids of the time steps (https://arxiv.org/abs/1706.03762, section 3.5).

    Args:
        timesteps: [N], any real dtype, may be fractional.
        embedding_dim: width; an odd one ends in a zero.
        flip_sin_to_cos: cosines first.
        downscale_freq_shift: the frequencies are max_period^(−i / (embedding_dim/2 − shift)).
        scale: multiplies the phases.
        max_period: largest period over 2π.

    Returns:
        [N, embedding_dim] in float32, whatever the dtype of `timesteps`: the original codes
        compute so, and their models were trained on these roundings.
    """
    half = embedding_dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * index / (half - downscale_freq_shift))
    phases = scale * (timesteps[:, None].float() * frequencies[None])
    pair = (phases.sin(), phases.cos())
    embedding = torch.cat(pair[::-1] if flip_sin_to_cos else pair, dim=-1)
    return F.pad(embedding, (0, embedding_dim % 2))


class Timesteps(nn.Module):
    """`get_timestep_embedding` as a module; it has no weights."""

    def __init__(
        self,
        num_channels: int,
        flip_sin_to_cos: bool,
        downscale_freq_shift: float,
        scale: float = 1,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift
        self.scale = scale

    def forward(self, timesteps: Tensor) -> Tensor:
        """[N] → [N, num_channels] in float32."""
        return get_timestep_embedding(
            timesteps,
            self.num_channels,
            flip_sin_to_cos=self.flip_sin_to_cos,
            downscale_freq_shift=self.downscale_freq_shift,
            scale=self.scale,
        )


class GaussianFourierProjection(nn.Module):
    """Sinusoids of fixed random frequencies (https://arxiv.org/abs/2006.10739).

    Args:
        embedding_size: number of frequencies; the output is twice as wide.
        scale: standard deviation of the frequencies.
        log: embed the logarithm of the input, as for noise levels.
        flip_sin_to_cos: cosines first.
    """

    def __init__(
        self,
        embedding_size: int = 256,
        scale: float = 1.0,
        log: bool = True,
        flip_sin_to_cos: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)
        self.log = log
        self.flip_sin_to_cos = flip_sin_to_cos

    def forward(self, x: Tensor) -> Tensor:
        """[N] → [N, 2·embedding_size] in the dtype of the frequencies and x, float32 at least."""
        x = torch.log(x) if self.log else x
        phases = x[:, None] * self.weight[None] * 2 * math.pi
        pair = (phases.sin(), phases.cos())
        return torch.cat(pair[::-1] if self.flip_sin_to_cos else pair, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers from a vector to the embedding that residual blocks receive.

    Args:
        in_channels: width of the input.
        time_embed_dim: width of the output.
        act_fn: activation between the layers.
        post_act_fn: activation at the end, or None.
        cond_proj_dim: width of a second input that is projected and added to the first, as
            guidance-distilled models take it; None: there is none.
    """

    def __init__(
        self,
        in_channels: int,
        time_embed_dim: int,
        act_fn: str = "silu",
        post_act_fn: str | None = None,
        cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.cond_proj = (
            None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        )
        self.act = get_activation(act_fn)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)
        self.post_act = None if post_act_fn is None else get_activation(post_act_fn)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """[N, in_channels], [N, cond_proj_dim] or None → [N, time_embed_dim].

        Raises:
            ConfigError: a condition is given to an embedding that was built without one.
        """
        if condition is not None:
            if self.cond_proj is None:
                raise ConfigError("timestep_cond: given, but the config has no time_cond_proj_dim")
            sample = sample + self.cond_proj(condition)
        sample = self.linear_2(self.act(self.linear_1(sample)))
        return sample if self.post_act is None else self.post_act(sample)


class AttentionPooling(nn.Module):
    """One vector for a sequence: its mean attends to itself and to every element.

    Args:
        num_heads: heads; they divide `embed_dim`.
        embed_dim: width of the sequence.
    """

    def __init__(self, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ConfigError(
                f"addition_embed_type_num_heads: {num_heads} heads do not divide "
                f"{embed_dim} channels"
            )
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, embed_dim] → [B, embed_dim]."""
        summary = x.mean(dim=1, keepdim=True) + self.positional_embedding
        sequence = torch.cat([summary, x], dim=1)
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(summary), self.k_proj(sequence), self.v_proj(sequence))
        )
        pooled = F.scaled_dot_product_attention(query, key, value)
        return pooled.transpose(1, 2).flatten(1)


class TextTimeEmbedding(nn.Module):
    """A text's pooled features as an addition to the time embedding.

    Args:
        encoder_dim: width of the text's features.
        time_embed_dim: width of the output.
        num_heads: heads of the pooling.
    """

    def __init__(self, encoder_dim: int, time_embed_dim: int, num_heads: int = 64) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(encoder_dim)
        self.pool = AttentionPooling(num_heads, encoder_dim)
        self.proj = nn.Linear(encoder_dim, time_embed_dim)
        self.norm2 = nn.LayerNorm(time_embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, encoder_dim] → [B, time_embed_dim]."""
        return self.norm2(self.proj(self.pool(self.norm1(hidden_states))))
