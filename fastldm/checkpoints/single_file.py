"""One model from a single file of CompVis or Stability, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastldm.checkpoints import splitting
from fastldm.checkpoints.condition_params import (
    condition_class,
    condition_config,
    infer_condition,
)
from fastldm.checkpoints.conditioner_keys import conditioner_places
from fastldm.checkpoints.describing import first_stage_arguments, unet_arguments
from fastldm.checkpoints.first_stage_keys import LEFT_OUT, first_stage_places
from fastldm.checkpoints.first_stage_params import first_stage_config, infer_first_stage
from fastldm.checkpoints.keymap import Row, make_rows, to_compvis, to_fastldm
from fastldm.checkpoints.ldm_params import ConditionParams, LDMParams, parse_ldm
from fastldm.checkpoints.reading import Source
from fastldm.checkpoints.splitting import SingleFile, split_file
from fastldm.checkpoints.unet_keys import unet_places
from fastldm.checkpoints.unet_params import unet_class, unet_config
from fastldm.checkpoints.unet_shapes import infer_unet
from fastldm.checkpoints.yaml_files import read_yaml
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models.autoencoder_kl import AutoencoderKL
from fastldm.models.base import ModelMixin
from fastldm.models.class_embedder import ClassEmbedder
from fastldm.models.spatial_rescaler import SpatialRescaler
from fastldm.models.text_encoder import TextEncoder
from fastldm.models.unet_2d import UNet2DModel
from fastldm.models.unet_2d_condition import UNet2DConditionModel
from fastldm.models.vq_model import VQModel
from fastldm.modules.codebook_remap import checked_used
from fastldm.storage import read_json

ConfigSource = str | Path | Mapping[str, Any]
"""CompVis's YAML file or its content; or the config of our model: its fields, file or folder."""

_Model = TypeVar("_Model", bound=ModelMixin)

_HEAD_FIELDS = ("attention_head_dim", "num_attention_heads", "num_head_channels")
_SCALING_FACTORS = {"AutoencoderKL": 0.18215, "VQModel": 1.0}
"""Where neither file nor config says it: Stable Diffusion's, and that of CompVis's VQ models."""
_SDXL_SCALING_FACTOR = 0.13025

_PART_OF: dict[type[ModelMixin], str] = {
    UNet2DModel: "unet",
    UNet2DConditionModel: "unet",
    AutoencoderKL: "first_stage",
    VQModel: "first_stage",
    ClassEmbedder: "condition",
    TextEncoder: "condition",
    SpatialRescaler: "condition",
}


@dataclass(frozen=True)
class Given:
    """What the caller says of a file.

    Attributes:
        params: of CompVis's YAML file; None without one.
        fields: a config of our model, in its place.
        overrides: replace single fields of our model's config.
        use_ema: read the moving averages of a UNet's weights; None: as the YAML file says, else
            where the file has them.
        torch_dtype: floating-point dtype of the models; None: theirs.
    """

    params: LDMParams | None = None
    fields: Mapping[str, Any] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    use_ema: bool | None = None
    torch_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        dtype = self.torch_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"torch_dtype: expected a floating torch.dtype, got {dtype!r}")


def read_config(config: ConfigSource | None) -> LDMParams | Mapping[str, Any] | None:
    """CompVis's YAML file as `LDMParams`, the config of one of our models as a mapping.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: it is neither.
    """
    if config is None:
        return None
    if not isinstance(config, Mapping):
        path = Path(config)
        if path.is_dir():
            return ModelMixin.load_config(path)
        config = read_json(path) if path.suffix == ".json" else read_yaml(path)
        if not isinstance(config, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {type(config).__name__}")
    return parse_ldm(config) if {"model", "params"} & set(config) else config


def load_single_file(
    kind: type[_Model],
    source: Source,
    config: ConfigSource | None = None,
    use_ema: bool | None = None,
    torch_dtype: torch.dtype | None = None,
    **overrides: Any,
) -> _Model:
    """See `ModelMixin.from_single_file`."""
    part = next((part for own, part in _PART_OF.items() if issubclass(kind, own)), None)
    if part is None:
        raise ConfigError(f"{kind.__name__}: CompVis's single files hold no such model")
    said = read_config(config)
    if isinstance(said, LDMParams) or said is None:
        given = Given(said, None, overrides, use_ema, torch_dtype)
    else:
        given = Given(None, said, overrides, use_ema, torch_dtype)
    file = split_file(source)
    if part == "unet":
        return load_unet(kind, file, given)
    if part == "first_stage":
        return load_first_stage(kind, file, given)
    return load_conditioner(kind, file, given)


def unet_fields(file: SingleFile, given: Given) -> tuple[str, dict[str, Any]]:
    """The class and config of the UNet in a file.

    Raises:
        CheckpointError: the file holds none, or one that is smaller than the YAML file says.
        ConfigError: fastldm has no such UNet, or nothing says its number of heads.
    """
    params = None if given.params is None else given.params.unet
    if params is None:
        params = infer_unet(file.require("unet"), file.source)
    else:
        _check_size("UNet", params.size, max(len(file.unet), len(file.averages)), file.source)
    fields = unet_config(params)
    diffusion = None if given.params is None else given.params.diffusion
    if diffusion is not None and diffusion.image_size is not None:
        # Stable Diffusion's files leave the UNet's own at another value, which nothing uses.
        fields["sample_size"] = diffusion.image_size
    heads_known = params.num_heads != -1 or params.num_head_channels != -1
    if not heads_known and not any(name in given.overrides for name in _HEAD_FIELDS):
        raise ConfigError(
            f"{file.source}: names and shapes do not tell the number of attention heads; give "
            "CompVis's YAML file as config=, or num_attention_heads="
        )
    return unet_class(params), fields


def load_unet(kind: type[_Model], file: SingleFile, given: Given) -> _Model:
    """The UNet of a file, in eval mode; see `unet_fields` for the errors."""
    fields = given.fields
    if fields is None:
        class_name, fields = unet_fields(file, given)
        _check_class(kind, class_name, file.source)
    model = kind._build_for_loading({**fields, **given.overrides}, file.source)
    rows = model_rows(model, new_attention_order(given))
    tensors = file.weights_of_unet(uses_ema(file, given), [row.theirs for row in rows])
    return _fill(model, rows, tensors, file.source, given.torch_dtype)


def load_first_stage(kind: type[_Model], file: SingleFile, given: Given) -> _Model:
    """The first stage of a file, in eval mode; see `first_stage_fields` for the errors."""
    tensors = file.require("first_stage")
    fields = given.fields
    if fields is None:
        class_name, fields = first_stage_fields(file, given)
        _check_class(kind, class_name, file.source)
    model = kind._build_for_loading({**fields, **given.overrides}, file.source)
    return _fill(model, model_rows(model), tensors, file.source, given.torch_dtype)


def first_stage_fields(file: SingleFile, given: Given) -> tuple[str, dict[str, Any]]:
    """The class and config of the first stage in a file.

    Raises:
        CheckpointError: the file holds none, or one that is smaller than the YAML file says.
        ConfigError: fastldm has no such first stage.
    """
    tensors = file.require("first_stage")
    params = None if given.params is None else given.params.first_stage
    if params is None:
        params = infer_first_stage(tensors, file.source)
    else:
        _check_size("first stage", params.coder.size, len(tensors), file.source)
    fields = first_stage_config(params)
    fields["scaling_factor"] = scaling_factor(file, given, params.class_name)
    if params.is_remapped:
        if "quantize.used" not in tensors:
            raise CheckpointError(f"{file.source}: remap: the file has no quantize.used")
        fields["num_used_embeddings"] = tensors["quantize.used"].numel()
    return params.class_name, fields


def scaling_factor(file: SingleFile, given: Given, class_name: str) -> float:
    """The factor of the latents: the buffer of ``scale_by_std``, or what the YAML file says.

    Raises:
        CheckpointError: the buffer is no factor.
    """
    diffusion = None if given.params is None else given.params.diffusion
    buffer = file.root.get("scale_factor")
    if buffer is not None and not buffer.is_meta and (diffusion is None or diffusion.scale_by_std):
        value = float(buffer) if buffer.numel() == 1 else float("nan")
        if not 0 < value < float("inf"):
            raise CheckpointError(f"{file.source}: scale_factor is {list(buffer.shape)}, {value}")
        return value
    if diffusion is not None:
        return diffusion.scale_factor
    return _SDXL_SCALING_FACTOR if file.embedders else _SCALING_FACTORS[class_name]


def load_conditioner(kind: type[_Model], file: SingleFile, given: Given) -> _Model:
    """The cond stage of a file, in eval mode; see `condition_fields` for the errors."""
    fields = given.fields
    if fields is None:
        class_name, fields = condition_fields(file, given)
        _check_class(kind, class_name, file.source)
    model = kind._build_for_loading({**fields, **given.overrides}, file.source)
    return _fill(model, model_rows(model), file.condition, file.source, given.torch_dtype)


def condition_fields(file: SingleFile, given: Given) -> tuple[str, dict[str, Any]]:
    """The class and config of the cond stage in a file.

    Raises:
        CheckpointError: the file holds none that fastldm has.
        ConfigError: fastldm has none as the YAML file says.
    """
    condition = None if given.params is None else given.params.condition
    if not isinstance(condition, ConditionParams) or condition_class(condition) is None:
        class_name, fields = infer_condition(file.require("condition"), file.source)
    else:
        class_name, fields = str(condition_class(condition)), condition_config(condition)
    if class_name == "TextEncoder":
        fields["with_logits_head"] = "transformer.to_logits.weight" in file.condition
    return class_name, fields


def model_rows(model: nn.Module, new_attention_order: bool = False) -> list[Row]:
    """The table of a model's weights.

    Raises:
        ConfigError: CompVis's layout has no place for the model or one of its weights.
    """
    state = model.state_dict()
    if isinstance(model, UNet2DModel | UNet2DConditionModel):
        return make_rows(unet_places(model, new_attention_order), state)
    if isinstance(model, AutoencoderKL | VQModel):
        return make_rows(first_stage_places(model), state, LEFT_OUT)
    return make_rows(conditioner_places(model), state)


def compvis_state_dict(
    model: nn.Module, prefix: str | None = None, new_attention_order: bool = False
) -> dict[str, Tensor]:
    """A model's weights under CompVis's names.

    Args:
        model: a UNet, a first stage, a conditioner, or a CLIP text encoder of transformers.
        prefix: of the names; None: "model.diffusion_model." for a UNet, "cond_stage_model." for
            a conditioner, and none for a first stage, whose files stand alone.
        new_attention_order: see `fastldm.checkpoints.unet_keys.unet_places`.

    Raises:
        ConfigError: CompVis's layout has no place for the model or one of its weights.
    """
    if prefix is None:
        part = next((part for own, part in _PART_OF.items() if isinstance(model, own)), "condition")
        prefix = {
            "unet": splitting.UNET_PREFIX,
            "first_stage": "",
            "condition": splitting.CONDITION_PREFIX,
        }[part]
    check_expressible(model)
    tensors = to_compvis(model_rows(model, new_attention_order), model.state_dict())
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def check_expressible(model: nn.Module) -> None:
    """Require that CompVis's classes, given the weights of `model`, are the same network.

    Raises:
        ConfigError: they have other numbers of heads or groups, another activation, or the like.
    """
    if isinstance(model, UNet2DModel | UNet2DConditionModel):
        unet_arguments(model)
    elif isinstance(model, AutoencoderKL | VQModel):
        first_stage_arguments(model)


def _fill(
    model: _Model,
    rows: Sequence[Row],
    tensors: Mapping[str, Tensor],
    source: str,
    torch_dtype: torch.dtype | None,
) -> _Model:
    """Put the weights into a model that was built without storage."""
    state = to_fastldm(rows, tensors, model.state_dict(), source, torch_dtype)
    if isinstance(model, VQModel):
        _check_used(state.get("quantize.used"), model.quantize.num_embeddings, source)
        state |= _state_of_codebook(model, state["quantize.embedding.weight"])
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check_used(used: Tensor | None, num_embeddings: int, source: str) -> None:
    """Codes that the codebook does not have would be read beyond its end."""
    try:
        if used is not None:
            checked_used(used, num_embeddings)
    except ConfigError as error:
        raise CheckpointError(f"{source}: quantize.{error}") from None


def _state_of_codebook(model: VQModel, codes: Tensor) -> dict[str, Tensor]:
    """Moving averages that start from the codes as they are, where the model has any."""
    fresh = {
        "quantize.ema_counts": codes.new_ones(len(codes)),
        "quantize.ema_sums": codes.clone(),
        "quantize.data_initialized": torch.ones((), dtype=torch.bool, device=codes.device),
    }
    wanted = model.state_dict()
    return {name: tensor for name, tensor in fresh.items() if name in wanted}


def new_attention_order(given: Given) -> bool:
    """Whether the file's packed projections are in that order."""
    unet = None if given.params is None else given.params.unet
    return unet is not None and unet.use_new_attention_order


def uses_ema(file: SingleFile, given: Given) -> bool:
    """Whether the moving averages of the UNet's weights are taken."""
    if given.use_ema is not None:
        return given.use_ema
    diffusion = None if given.params is None else given.params.diffusion
    return bool(file.averages) and (diffusion is None or diffusion.use_ema)


def _check_class(kind: type[Any], class_name: str, source: str) -> None:
    names = {base.__name__ for base in kind.__mro__}
    if class_name not in names:
        raise CheckpointError(
            f"{source}: its weights are those of {class_name}, not {kind.__name__}"
        )


def _check_size(part: str, least: int, count: int, source: str) -> None:
    """A config of a larger model than the file has weights for would take long to build."""
    if least > count:
        raise CheckpointError(
            f"{source}: the config is of a {part} with at least {least} weights, the file has "
            f"{count}"
        )
