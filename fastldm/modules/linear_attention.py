"""Attention whose cost is linear in the number of pixels, as some first stages have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearAttention(nn.Module):
    """Keys and values are first contracted over the pixels, then read by the queries.

    It is efficient attention (Shen et al., https://arxiv.org/abs/1812.01243) with one head, in the
    form of CompVis's autoencoders: the softmax is over the keys' pixels only, there is no norm
    before it, and its output is not added to the input.

    Args:
        channels: of the feature map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: Tensor, zq: Tensor | None = None) -> Tensor:
        """[B, channels, H, W] → the same; `zq` is not used."""
        query, key, value = self.to_qkv(hidden_states).flatten(2).chunk(3, dim=1)
        context = torch.einsum("bdn,ben->bde", key.softmax(dim=-1), value)
        output = torch.einsum("bde,bdn->ben", context, query)
        return self.to_out(output.unflatten(2, hidden_states.shape[2:]))
