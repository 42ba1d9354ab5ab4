"""The arguments of CompVis's UNetModel, and the config of ours that is the same network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastldm.errors import ConfigError

IGNORED = frozenset(
    {"use_checkpoint", "use_fp16", "use_bf16", "legacy", "spatial_transformer_attn_type"}
)
"""Arguments that change how it is computed; ``legacy`` does not change the heads that result."""

_ADDED_WIDTHS = (2816, 2560)
"""``adm_in_channels`` of SDXL's base and refiner: pooled text and six or five embedded numbers."""
_NUMBER_WIDTH = 256
_SDXL_SAMPLE_SIZE = 128
"""Of 1024² pixels, where neither file nor config says it."""


@dataclass(frozen=True)
class UNetParams:
    """Arguments of UNetModel that shape it, with its defaults, Stability's additions included."""

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int | tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    image_size: int | None = None
    dropout: float = 0.0
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | str | None = None
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int | tuple[int, ...] = 1
    context_dim: int | tuple[int, ...] | None = None
    n_embed: int | None = None
    disable_self_attentions: tuple[bool, ...] | None = None
    num_attention_blocks: tuple[int, ...] | None = None
    disable_middle_self_attn: bool = False
    use_linear_in_transformer: bool = False
    adm_in_channels: int | None = None
    transformer_depth_middle: int | None = None

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.channel_mult)

    @property
    def layers(self) -> list[int]:
        """Residual blocks of each level on the way down."""
        return _per_level("num_res_blocks", self.num_res_blocks, self.levels)

    @property
    def depths(self) -> list[int]:
        """Transformer blocks after each residual block of each level."""
        return _per_level("transformer_depth", self.transformer_depth, self.levels)

    @property
    def attended(self) -> list[bool]:
        """Whether each level has attention."""
        return [2**level in self.attention_resolutions for level in range(self.levels)]

    @property
    def size(self) -> int:
        """A number of weights that such a model has at least, known without building it."""
        return sum(
            4 * (2 * layers + 1) * (1 + depth * attended)
            for layers, depth, attended in zip(self.layers, self.depths, self.attended, strict=True)
        )


def _per_level(name: str, value: int | Sequence[int], levels: int) -> list[int]:
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels or min(values, default=0) < 0:
        raise ConfigError(
            f"{name}: expected {levels} numbers, one a level of channel_mult, got {values!r:.60}"
        )
    return values


def unet_class(params: UNetParams) -> str:
    """The name of our class for it."""
    return "UNet2DConditionModel" if params.use_spatial_transformer else "UNet2DModel"


def unet_config(params: UNetParams) -> dict[str, Any]:
    """The config of our class for it.

    Raises:
        ConfigError: an argument has a value that our models do not have.
    """
    _refuse_unsupported(params)
    kind = "CrossAttn" if params.use_spatial_transformer else "Attn"
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if params.resblock_updown
        else ("DownBlock2D", "UpBlock2D")
    )
    resampling = "resnet" if params.resblock_updown else "conv"
    config: dict[str, Any] = {
        "sample_size": params.image_size,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "block_out_channels": [params.model_channels * factor for factor in params.channel_mult],
        "down_block_types": [
            f"{kind}DownBlock2D" if attended else down for attended in params.attended
        ],
        "up_block_types": [
            f"{kind}UpBlock2D" if attended else up for attended in reversed(params.attended)
        ],
        "dropout": params.dropout,
        "resnet_time_scale_shift": "scale_shift" if params.use_scale_shift_norm else "default",
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resample_with_conv": params.conv_resample,
    }
    config.update(
        _transformer_fields(params) if params.use_spatial_transformer else _plain_fields(params)
    )
    return config


def _plain_fields(params: UNetParams) -> dict[str, Any]:
    if isinstance(params.num_classes, str):
        raise ConfigError(
            f"num_classes: {params.num_classes!r} is supported with use_spatial_transformer only"
        )
    if len(set(params.layers)) != 1:
        raise ConfigError("num_res_blocks: expected the same number at each level")
    fields: dict[str, Any] = {
        "layers_per_block": params.layers[0],
        "attn_norm_num_groups": 32,
        "num_class_embeds": params.num_classes,
    }
    if params.num_head_channels != -1:
        fields["attention_head_dim"] = params.num_head_channels
    elif params.num_heads != -1:
        fields["num_attention_heads"] = params.num_heads
        fields["attention_head_dim"] = None
    return fields


def _transformer_fields(params: UNetParams) -> dict[str, Any]:
    if not isinstance(params.context_dim, int):
        # Stability's refiner lists it once a transformer block.
        if params.context_dim is None or len(set(params.context_dim)) != 1:
            raise ConfigError("context_dim: needed by use_spatial_transformer, one for all blocks")
        context_dim = params.context_dim[0]
    else:
        context_dim = params.context_dim
    fields: dict[str, Any] = {
        "layers_per_block": params.layers,
        "cross_attention_dim": context_dim,
        "transformer_layers_per_block": params.depths,
        "use_linear_projection": params.use_linear_in_transformer,
        **_class_fields(params),
    }
    if params.disable_self_attentions is not None:
        fields["only_cross_attention"] = list(params.disable_self_attentions)
    if params.num_head_channels != -1:
        fields["num_head_channels"] = params.num_head_channels
    elif params.num_heads != -1:
        fields["attention_head_dim"] = params.num_heads
    for name in ("layers_per_block", "transformer_layers_per_block"):
        if len(set(fields[name])) == 1:
            fields[name] = fields[name][0]
    return fields


def _class_fields(params: UNetParams) -> dict[str, Any]:
    classes, width = params.num_classes, params.adm_in_channels
    if not isinstance(classes, str):
        return {"num_class_embeds": classes}
    if classes == "continuous":
        return {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 1}
    if classes != "sequential" or width is None:
        raise ConfigError(
            f"num_classes: expected a number, 'continuous', or 'sequential' with adm_in_channels, "
            f"got {classes!r:.60}"
        )
    added = {"projection_class_embeddings_input_dim": width}
    if width in _ADDED_WIDTHS:
        return {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _NUMBER_WIDTH,
            "sample_size": params.image_size or _SDXL_SAMPLE_SIZE,
            **added,
        }
    return {"class_embed_type": "projection", **added}


def _refuse_unsupported(params: UNetParams) -> None:
    """What UNetModel can be and our models cannot."""
    middle = params.transformer_depth_middle
    last_depth = params.depths[-1] if params.levels else None
    for name, value, supported in (
        ("channel_mult", params.channel_mult, _starts_at_one(params.channel_mult)),
        ("dims", params.dims, params.dims == 2),
        ("n_embed", params.n_embed, params.n_embed is None),
        ("num_heads_upsample", params.num_heads_upsample, _same_heads(params)),
        ("num_attention_blocks", "a list", params.num_attention_blocks is None),
        ("disable_middle_self_attn", True, not params.disable_middle_self_attn),
        ("transformer_depth_middle", middle, middle in (None, last_depth)),
        ("model_channels", params.model_channels, params.model_channels > 0),
    ):
        if not supported:
            raise ConfigError(f"{name}: fastldm has no such UNet, got {value!r:.60}")


def _starts_at_one(multipliers: Sequence[int]) -> bool:
    """UNetModel's first and last convolutions fit no other multiplier of the first level."""
    return bool(multipliers) and multipliers[0] == 1 and min(multipliers) > 0


def _same_heads(params: UNetParams) -> bool:
    given = params.num_heads_upsample
    return given in (-1, params.num_heads) or params.num_head_channels != -1
