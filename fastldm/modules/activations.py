"""Activation functions and GroupNorm with one, by the names that diffusers' configs use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
}


def get_activation(name: str) -> nn.Module:
    """The activation called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if not isinstance(name, str) or name.lower() not in _ACTIVATIONS:
        raise ConfigError(f"act_fn: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name.lower()]()


class GroupNorm(nn.GroupNorm):
    """GroupNorm and an activation through `fastldm.ops.group_norm_silu`."""

    def forward(  # type: ignore[override]
        self, x: Tensor, activation: nn.Module | None = None, **fused: Any
    ) -> Tensor:
        """
        Args:
            x: [B, C, *spatial].
            activation: SiLU runs inside the operator, any other one after it.
            fused: ``channel_add``, ``residual``, ``scale`` or ``shift`` of the operator.
        """
        silu = isinstance(activation, nn.SiLU)
        y = ops.group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            activation="silu" if silu else None,
            **fused,
        )
        return y if silu or activation is None else activation(y)


def group_norm(channels: int, num_groups: int, eps: float) -> GroupNorm:
    """`GroupNorm` of that many channels.

    Raises:
        ConfigError: the channels cannot be divided into that many groups.
    """
    if num_groups < 1 or channels % num_groups:
        raise ConfigError(
            f"norm_num_groups: {channels} channels do not divide into {num_groups} groups"
        )
    return GroupNorm(num_groups, channels, eps=eps)
