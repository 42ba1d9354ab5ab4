"""What the UNets share: levels named by block types, and the way down, across and up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError, DataError
from fastldm.models.attention_mixin import AttentionMixin
from fastldm.models.base import ModelMixin
from fastldm.modules.activations import group_norm
from fastldm.modules.freeu import FreeU
from fastldm.modules.unet_blocks import (
    AttentionOptions,
    Context,
    PlainAttentionOptions,
    ResnetOptions,
    TransformerOptions,
    UNetDownBlock2D,
    UNetMidBlock2D,
    UNetUpBlock2D,
)

RESAMPLING_TYPES = ("conv", "resnet")


class BlockType(NamedTuple):
    """What the name of a block type stands for."""

    attention: type[AttentionOptions] | None
    """The attention after each residual block."""
    resampling: str | None
    """"conv", "resnet" (a residual block), or None: what the model's config says."""


DOWN_BLOCK_TYPES: Mapping[str, BlockType] = {
    "DownBlock2D": BlockType(None, "conv"),
    "AttnDownBlock2D": BlockType(PlainAttentionOptions, None),
    "CrossAttnDownBlock2D": BlockType(TransformerOptions, None),
    "ResnetDownsampleBlock2D": BlockType(None, "resnet"),
}
UP_BLOCK_TYPES: Mapping[str, BlockType] = {
    "UpBlock2D": BlockType(None, "conv"),
    "AttnUpBlock2D": BlockType(PlainAttentionOptions, None),
    "CrossAttnUpBlock2D": BlockType(TransformerOptions, None),
    "ResnetUpsampleBlock2D": BlockType(None, "resnet"),
}


@dataclass(frozen=True)
class UNetOptions:
    """The fields of both UNets' configs that shape the levels, one entry a level where plural."""

    block_out_channels: Sequence[int]
    down_block_types: Sequence[str]
    up_block_types: Sequence[str]
    layers_per_block: Sequence[int]
    downsample_padding: int
    downsample_type: str
    upsample_type: str
    resample_with_conv: bool

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if levels == 0:
            raise ConfigError("block_out_channels: expected at least one level, got none")
        for name in ("down_block_types", "up_block_types"):
            check_length(name, getattr(self, name), levels)
        for name in ("downsample_type", "upsample_type"):
            check_choice(name, getattr(self, name), RESAMPLING_TYPES)


AttentionOfLevel = Callable[[type[AttentionOptions], int], AttentionOptions]
"""Maps the kind of attention and the number of a block to the options of its attention."""


class UNetBase(AttentionMixin, ModelMixin):
    """A UNet whose subclass makes the embeddings and says which attention a level has."""

    time_proj: nn.Module
    class_embedding: nn.Module | None
    mid_block: UNetMidBlock2D | None
    _class_embed_type: str | None

    ignored_config_keys = frozenset(
        # diffusers' EMAModel saves its own settings into the same file.
        {
            "decay",
            "inv_gamma",
            "min_decay",
            "optimization_step",
            "power",
            "update_after_step",
            "use_ema_warmup",
        }
    )

    def _add_levels(
        self,
        options: UNetOptions,
        resnet: ResnetOptions,
        mid_block: UNetMidBlock2D | None,
        down_attention: AttentionOfLevel,
        up_attention: AttentionOfLevel,
    ) -> None:
        """Set ``down_blocks``, ``mid_block`` and ``up_blocks``."""
        channels = list(options.block_out_channels)
        last = len(channels) - 1
        self.num_upsamplers = last
        self._needs_divisible_size = False

        def resampling(block_type: BlockType, default: str, level: int) -> str | None:
            if level == last:
                return None
            kind = block_type.resampling or default
            self._needs_divisible_size |= kind == "resnet"
            return "plain" if kind == "conv" and not options.resample_with_conv else kind

        # An IP-Adapter numbers the attentions in this order.
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        self.mid_block = mid_block
        for level, name in enumerate(options.down_block_types):
            block_type = _block_type("down_block_types", name, DOWN_BLOCK_TYPES)
            kind = block_type.attention
            self.down_blocks.append(
                UNetDownBlock2D(
                    channels[max(level - 1, 0)],
                    channels[level],
                    options.layers_per_block[level],
                    resnet,
                    None if kind is None else down_attention(kind, level),
                    resampling(block_type, options.downsample_type, level),
                    options.downsample_padding,
                )
            )
        channels.reverse()
        layers = list(reversed(options.layers_per_block))
        for level, name in enumerate(options.up_block_types):
            block_type = _block_type("up_block_types", name, UP_BLOCK_TYPES)
            kind = block_type.attention
            self.up_blocks.append(
                UNetUpBlock2D(
                    channels[min(level + 1, last)],
                    channels[max(level - 1, 0)],
                    channels[level],
                    layers[level] + 1,
                    resnet,
                    None if kind is None else up_attention(kind, level),
                    resampling(block_type, options.upsample_type, level),
                )
            )

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Turn on FreeU (https://arxiv.org/abs/2309.11497).

        Args:
            s1, s2: factors of the skips' low frequencies at the lowest and second lowest
                resolution.
            b1, b2: factors of half of the backbone's channels there.
        """
        for block, factors in zip(self.up_blocks, ((b1, s1), (b2, s2)), strict=False):
            cast(UNetUpBlock2D, block).freeu = FreeU(*factors)

    def disable_freeu(self) -> None:
        """Turn off FreeU."""
        for block in self.up_blocks:
            cast(UNetUpBlock2D, block).freeu = None

    def _add_ends(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        norm_num_groups: int,
        norm_eps: float,
        act: nn.Module,
        kernels: tuple[int, int] = (3, 3),
    ) -> None:
        """Set ``conv_in``, ``conv_norm_out``, ``conv_act`` and ``conv_out``."""
        first, final = kernels
        self._in_channels = in_channels
        self.conv_in = nn.Conv2d(in_channels, channels, first, padding=(first - 1) // 2)
        self.conv_norm_out = group_norm(channels, norm_num_groups, norm_eps)
        self.conv_act = act
        self.conv_out = nn.Conv2d(channels, out_channels, final, padding=(final - 1) // 2)

    def _check_sample(self, sample: Tensor) -> None:
        if sample.ndim != 4 or sample.shape[1] != self._in_channels:
            raise DataError(
                f"sample: expected [B, {self._in_channels}, H, W], got {list(sample.shape)}"
            )
        factor = 2**self.num_upsamplers
        height, width = sample.shape[2:]
        if self._needs_divisible_size and (height % factor or width % factor):
            raise DataError(
                f"sample: residual blocks that resample need height and width that are multiples "
                f"of {factor}, got {height}×{width}"
            )

    def _timesteps(self, timestep: Tensor | float | int, sample: Tensor) -> Tensor:
        """`timestep` as [B] on the sample's device."""
        if isinstance(timestep, Tensor):
            timesteps = timestep.to(sample.device)
        else:
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timesteps = torch.tensor(timestep, dtype=dtype, device=sample.device)
        timesteps = timesteps[None] if timesteps.ndim == 0 else timesteps
        if timesteps.ndim != 1 or timesteps.shape[0] not in (1, sample.shape[0]):
            raise DataError(
                f"timestep: expected a number or [{sample.shape[0]}], got {list(timesteps.shape)}"
            )
        return timesteps.expand(sample.shape[0])

    def _embed_classes(self, class_labels: Tensor | None, emb: Tensor) -> Tensor | None:
        """[B, width] of the classes, or None in a model without them."""
        if self.class_embedding is None:
            if class_labels is not None:
                raise DataError("class_labels: given, but this model has no classes")
            return None
        batch = emb.shape[0]
        if class_labels is None:
            raise DataError(f"class_labels: this model needs [{batch}] of them, got None")
        if class_labels.shape[:1] != emb.shape[:1]:
            raise DataError(
                f"class_labels: expected {batch} of them, got {list(class_labels.shape)}"
            )
        if isinstance(self.class_embedding, nn.Embedding) and (
            class_labels.is_floating_point() or class_labels.ndim != 1
        ):
            raise DataError(
                f"class_labels: expected [{batch}] integers, got {list(class_labels.shape)} "
                f"{class_labels.dtype}"
            )
        if self._class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels).to(emb.dtype)
        return self.class_embedding(class_labels).to(emb.dtype)

    def _down(
        self,
        sample: Tensor,
        emb: Tensor,
        context: Context | None = None,
        intrablock_residuals: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """The way down: its output, and every feature map that the way up takes."""
        states = [sample]
        for level, block in enumerate(cast(Iterable[UNetDownBlock2D], self.down_blocks)):
            residual = intrablock_residuals[level] if level < len(intrablock_residuals) else None
            if block.has_cross_attention:
                sample, added = block(sample, emb, context, residual)
            else:
                sample, added = block(sample, emb)
                if residual is not None:
                    # After the downsampler, and in the last feature map handed over as well.
                    sample = sample + residual
                    added = (*added[:-1], sample)
            states.extend(added)
        return sample, states

    def _up(
        self, sample: Tensor, states: list[Tensor], emb: Tensor, context: Context | None = None
    ) -> Tensor:
        """The way up; it takes the feature maps of `states` from the end."""
        factor = 2**self.num_upsamplers
        full = states[0].shape[2:]
        divisible = full[0] % factor == 0 and full[1] % factor == 0
        for block in cast(Iterable[UNetUpBlock2D], self.up_blocks):
            taken = len(block.resnets)
            states, skipped = states[:-taken], states[-taken:]
            # A size that was rounded on the way down is not twice the smaller one.
            size = None if divisible or not states else states[-1].shape[2:]
            sample = block(sample, skipped, emb, context, size)
        return sample

    def _finish(self, sample: Tensor) -> Tensor:
        sample = self.conv_norm_out(sample, self.conv_act)
        return self.conv_out(sample)


def _block_type(field: str, name: str, known: Mapping[str, BlockType]) -> BlockType:
    short = name.removeprefix("UNetRes") if isinstance(name, str) else name
    check_choice(field, short, tuple(known))
    return known[short]


def check_choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """Raise `ConfigError` unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ConfigError(
            f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}"
        )


def check_length(name: str, value: Sequence[Any], levels: int) -> None:
    """Raise `ConfigError` unless there is one entry a level."""
    if len(value) != levels:
        raise ConfigError(
            f"{name}: expected {levels} entries, one a level of block_out_channels, got {value!r}"
        )


def per_level(name: str, value: Any, levels: int) -> list[Any]:
    """`value` for each level: a sequence as it is, anything else repeated.

    Raises:
        ConfigError: the sequence has another length.
    """
    if not isinstance(value, list | tuple):
        return [value] * levels
    check_length(name, value, levels)
    return list(value)
