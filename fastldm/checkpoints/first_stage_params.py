"""The arguments of CompVis's AutoencoderKL and VQModel, and the configs of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastldm.checkpoints.yaml_files import child, parse_fields
from fastldm.errors import CheckpointError, ConfigError

_IGNORED_PARAMS = frozenset(
    {
        "batch_resize_range",
        "ckpt_path",
        "colorize_nlabels",
        "ddconfig",
        "ema_decay",
        "ignore_keys",
        "image_key",
        "learn_logvar",
        "lossconfig",
        "lr_g_factor",
        "monitor",
        "sane_index_shape",
        "scheduler_config",
        "use_ema",
    }
)
_DEFAULT_RESOLUTION = 256
_ATTENTION_TYPES = {
    "vanilla": "default",
    "vanilla-xformers": "default",
    "memory-efficient": "default",
    "linear": "linear",
}
CLASSES = {
    "AutoencoderKL": "AutoencoderKL",
    "AutoencoderKLInferenceWrapper": "AutoencoderKL",
    "VQModel": "VQModel",
    "VQModelInterface": "VQModel",
}
"""Our class for the last part of a ``target``."""


@dataclass(frozen=True)
class CoderParams:
    """``ddconfig``: arguments of Encoder and Decoder, with their defaults."""

    ch: int
    out_ch: int
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    in_channels: int
    z_channels: int
    resolution: int = _DEFAULT_RESOLUTION
    ch_mult: tuple[int, ...] = (1, 2, 4, 8)
    double_z: bool = True
    dropout: float = 0.0
    resamp_with_conv: bool = True
    give_pre_end: bool = False
    tanh_out: bool = False
    use_linear_attn: bool = False
    attn_type: str = "vanilla"

    @property
    def attended(self) -> list[bool]:
        """Whether each level has attention."""
        levels = range(len(self.ch_mult))
        return [self.resolution // 2**level in self.attn_resolutions for level in levels]

    @property
    def size(self) -> int:
        """A number of weights that such a model has at least, known without building it."""
        return 4 * (2 * self.num_res_blocks + 1) * len(self.ch_mult)


@dataclass(frozen=True)
class _Codes:
    """What stands beside ``ddconfig``."""

    embed_dim: int
    n_embed: int | None = None
    remap: str | None = None


@dataclass(frozen=True)
class FirstStageParams:
    """Arguments of AutoencoderKL or VQModel.

    Attributes:
        class_name: of ours.
        coder: of encoder and decoder.
        embed_dim: channels of the latents.
        n_embed: number of codes.
        has_quant_conv: whether the 1×1 convolutions are there, as in all of CompVis's.
        is_remapped: whether indices count the codes of ``quantize.used``, which the file brings;
            the file that the YAML file names for them is not read.
    """

    class_name: str
    coder: CoderParams
    embed_dim: int
    n_embed: int | None = None
    has_quant_conv: bool = True
    is_remapped: bool = False


def parse_first_stage(class_name: str, params: Mapping[str, Any], where: str) -> FirstStageParams:
    """From the ``params`` of a YAML file.

    Raises:
        ConfigError: an argument is unknown, missing or of another type.
    """
    beside = parse_fields(
        _Codes,
        {name: value for name, value in params.items() if name != "ddconfig"},
        where,
        _IGNORED_PARAMS,
    )
    coder = parse_fields(CoderParams, child(params, "ddconfig", where), f"{where}.ddconfig")
    if class_name == "VQModel" and beside.n_embed is None:
        raise ConfigError(f"{where}.n_embed: missing")
    remapped = beside.remap is not None
    if remapped and class_name != "VQModel":
        raise ConfigError(f"{where}.remap: {class_name} has no codebook")
    return FirstStageParams(
        class_name, coder, beside.embed_dim, beside.n_embed, is_remapped=remapped
    )


def first_stage_config(params: FirstStageParams) -> dict[str, Any]:
    """The config of our class for it, without a scaling factor.

    Raises:
        ConfigError: an argument has a value that our models do not have.
    """
    coder = params.coder
    is_vq = params.class_name == "VQModel"
    if coder.double_z == is_vq:
        raise ConfigError(f"double_z: {coder.double_z} does not go with {params.class_name}")
    if coder.give_pre_end:
        raise ConfigError("give_pre_end: fastldm's decoder gives images, got True")
    kind = "linear" if coder.use_linear_attn else coder.attn_type
    if kind not in (*_ATTENTION_TYPES, "none"):
        raise ConfigError(f"attn_type: expected vanilla, linear or none, got {kind!r:.60}")
    if min(coder.ch, *coder.ch_mult) < 1 or coder.ch_mult[:1] != (1,):
        raise ConfigError(
            f"ch, ch_mult: expected positive numbers, and 1 for the first level, got {coder.ch} "
            f"and {coder.ch_mult!r:.60}"
        )
    attended = [flag and kind != "none" for flag in coder.attended]
    fields: dict[str, Any] = {
        "in_channels": coder.in_channels,
        "out_channels": coder.out_ch,
        "down_block_types": [
            "AttnDownEncoderBlock2D" if flag else "DownEncoderBlock2D" for flag in attended
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if flag else "UpDecoderBlock2D" for flag in reversed(attended)
        ],
        "block_out_channels": [coder.ch * factor for factor in coder.ch_mult],
        "layers_per_block": coder.num_res_blocks,
        "latent_channels": coder.z_channels,
        "sample_size": coder.resolution,
        "mid_block_add_attention": kind != "none",
        "output_activation": "tanh" if coder.tanh_out else None,
        "dropout": coder.dropout,
        "attention_type": _ATTENTION_TYPES.get(kind, "default"),
        "resample_with_conv": coder.resamp_with_conv,
    }
    narrowed = None if params.embed_dim == coder.z_channels else params.embed_dim
    if is_vq:
        fields |= {"num_vq_embeddings": params.n_embed, "vq_embed_dim": narrowed}
    else:
        with_convs = params.has_quant_conv
        fields |= {
            "embed_dim": narrowed,
            "use_quant_conv": with_convs,
            "use_post_quant_conv": with_convs,
        }
    return fields


def infer_first_stage(tensors: Mapping[str, Tensor], source: str) -> FirstStageParams:
    """The arguments of the first stage that has these weights, named without prefix.

    Raises:
        CheckpointError: they are not those of an AutoencoderKL or a VQModel.
    """
    try:
        return _infer(tensors)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source}: its first stage is none of CompVis's, as far as names and shapes tell "
            f"({type(error).__name__}: {error}); give config="
        ) from None


def _infer(tensors: Mapping[str, Tensor]) -> FirstStageParams:
    def shape(name: str) -> tuple[int, ...]:
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        number = 0
        while pattern.format(number) in tensors:
            number += 1
        return number

    is_vq = "quantize.embedding.weight" in tensors
    ch = shape("encoder.conv_in.weight")[0]
    levels = count("encoder.down.{}.block.0.conv1.weight")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if not levels or not ch or widths[0] != ch or any(width % ch for width in widths):
        raise ValueError(f"levels of {widths} channels after {ch}")
    attended = [
        level
        for level in range(levels)
        if {f"encoder.down.{level}.attn.0.{leaf}.weight" for leaf in ("q", "to_qkv")} & set(tensors)
    ]
    kind = "vanilla" if "encoder.mid.attn_1.q.weight" in tensors else "none"
    if "encoder.mid.attn_1.to_qkv.weight" in tensors:
        kind = "linear"
    coder = CoderParams(
        ch=ch,
        out_ch=shape("decoder.conv_out.weight")[0],
        num_res_blocks=count("encoder.down.0.block.{}.conv1.weight"),
        attn_resolutions=tuple(_DEFAULT_RESOLUTION // 2**level for level in attended),
        in_channels=shape("encoder.conv_in.weight")[1],
        z_channels=shape("decoder.conv_in.weight")[1],
        ch_mult=tuple(width // ch for width in widths),
        double_z=not is_vq,
        resamp_with_conv=levels == 1 or "encoder.down.0.downsample.conv.weight" in tensors,
        attn_type=kind,
    )
    if is_vq:
        codes, width = shape("quantize.embedding.weight")
        remapped = "quantize.used" in tensors
        return FirstStageParams("VQModel", coder, width, codes, is_remapped=remapped)
    has_quant_conv = "quant_conv.weight" in tensors
    width = shape("post_quant_conv.weight")[1] if has_quant_conv else coder.z_channels
    return FirstStageParams("AutoencoderKL", coder, width, None, has_quant_conv)
