"""Which attention each level of `UNet2DConditionModel` has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastldm.errors import ConfigError
from fastldm.models.unet_base import check_length
from fastldm.modules.unet_blocks import (
    AttentionOptions,
    PlainAttentionOptions,
    TransformerOptions,
)


@dataclass(frozen=True)
class AttentionFields:
    """Fields of the config with one entry a level of the way down, and those for all levels."""

    channels: Sequence[int]
    layers: Sequence[int]
    context_dims: Sequence[int]
    head_dims: Sequence[int]
    num_heads: Sequence[int | None]
    head_channels: int | None
    only_cross: Sequence[bool]
    transformer_layers: Sequence[int | Sequence[int]]
    reverse_transformer_layers: Sequence[int | Sequence[int]] | None
    groups: int
    eps: float
    use_linear_projection: bool
    upcast_attention: bool

    def __post_init__(self) -> None:
        if self.head_channels is not None and self.num_heads[0] is not None:
            raise ConfigError("num_head_channels, num_attention_heads: give one of them, got both")
        if self.reverse_transformer_layers is not None:
            check_length(
                "reverse_transformer_layers_per_block",
                self.reverse_transformer_layers,
                len(self.channels),
            )
        elif not all(isinstance(count, int) for count in self.transformer_layers):
            raise ConfigError(
                "reverse_transformer_layers_per_block: needed where transformer_layers_per_block "
                "has an entry for each residual block, got None"
            )

    def down(self, kind: type[AttentionOptions], level: int) -> AttentionOptions:
        """Of a level on the way down."""
        if kind is PlainAttentionOptions:
            return self._plain(level)
        counts = _counts(
            "transformer_layers_per_block", self.transformer_layers[level], self.layers[level]
        )
        return self._transformer(level, counts, self.only_cross[level])

    def up(self, kind: type[AttentionOptions], position: int) -> AttentionOptions:
        """Of the level at `position` on the way up."""
        if kind is PlainAttentionOptions:
            # diffusers, and so every checkpoint, reads these fields from the front here.
            return self._plain(position)
        level = len(self.channels) - 1 - position
        if self.reverse_transformer_layers is None:
            value = self.transformer_layers[level]
        else:
            value = self.reverse_transformer_layers[position]
        counts = _counts("reverse_transformer_layers_per_block", value, self.layers[level] + 1)
        return self._transformer(level, counts, self.only_cross[level])

    def mid(self) -> TransformerOptions:
        """Of the middle block."""
        value = self.transformer_layers[-1]
        return self._transformer(-1, [value if isinstance(value, int) else value[0]], False)

    def heads(self, level: int) -> int:
        """Heads of the transformers of a level on the way down."""
        if self.head_channels is None:
            return self.num_heads[level] or self.head_dims[level]
        if self.head_channels < 1 or self.channels[level] % self.head_channels:
            raise ConfigError(
                f"num_head_channels: {self.channels[level]} channels do not divide into heads of "
                f"{self.head_channels}"
            )
        return self.channels[level] // self.head_channels

    def _plain(self, level: int) -> PlainAttentionOptions:
        return PlainAttentionOptions(
            head_dim=self.head_channels or self.head_dims[level],
            num_heads=self.num_heads[level],
            groups=self.groups,
            eps=self.eps,
        )

    def _transformer(
        self, level: int, counts: Sequence[int], only_cross: bool
    ) -> TransformerOptions:
        return TransformerOptions(
            num_heads=self.heads(level),
            cross_attention_dim=self.context_dims[level],
            num_layers=counts,
            groups=self.groups,
            use_linear_projection=self.use_linear_projection,
            only_cross_attention=only_cross,
            upcast_attention=self.upcast_attention,
        )


def _counts(name: str, value: int | Sequence[int], layers: int) -> Sequence[int]:
    """Transformer blocks after each of `layers` residual blocks."""
    if isinstance(value, int):
        return [value] * layers
    if len(value) != layers:
        raise ConfigError(f"{name}: expected {layers} entries for a level, got {value!r}")
    return value
