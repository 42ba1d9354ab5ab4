"""All parts of a latent diffusion model from one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.checkpoints.clip_encoder import is_open_clip, load_clip
from fastldm.checkpoints.condition_params import condition_class
from fastldm.checkpoints.conditioner_keys import conditioner_places
from fastldm.checkpoints.keymap import make_rows
from fastldm.checkpoints.ldm_params import (
    FIRST_STAGE,
    UNCONDITIONAL,
    ConditionParams,
    DiffusionParams,
    LDMParams,
)
from fastldm.checkpoints.reading import Source
from fastldm.checkpoints.schedule import scheduler_fields
from fastldm.checkpoints.single_file import (
    ConfigSource,
    Given,
    condition_fields,
    first_stage_fields,
    load_conditioner,
    load_first_stage,
    load_unet,
    model_rows,
    new_attention_order,
    read_config,
    scaling_factor,
    unet_fields,
    uses_ema,
)
from fastldm.checkpoints.splitting import SingleFile, split_file
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models.autoencoder_kl import AutoencoderKL
from fastldm.models.base import ModelMixin
from fastldm.models.class_embedder import ClassEmbedder
from fastldm.models.spatial_rescaler import SpatialRescaler
from fastldm.models.text_encoder import TextEncoder
from fastldm.models.unet_2d import UNet2DModel
from fastldm.models.unet_2d_condition import UNet2DConditionModel
from fastldm.models.vq_model import VQModel

_MODELS: dict[str, type[ModelMixin]] = {
    kind.__name__: kind
    for kind in (
        AutoencoderKL,
        ClassEmbedder,
        SpatialRescaler,
        TextEncoder,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )
}
_CONDITIONING = {"crossattn": "crossattn", "concat": "concat", "hybrid": "hybrid", "adm": "class"}
_LOSS_FIELDS = (
    "loss_type",
    "l_simple_weight",
    "original_elbo_weight",
    "v_posterior",
    "learn_logvar",
    "logvar_init",
)


@dataclass(frozen=True)
class FileLayout:
    """What a file holds beside the weights that were chosen, to give it back as it was.

    Nothing here is trained or moved with a model; the tensors stay mapped to the file.

    Attributes:
        root: buffers of the noise schedule.
        scale_dtype: of the ``scale_factor`` buffer; None where the file has none.
        weights, averages: the UNet's raw weights, and their moving averages, by CompVis's names.
        averages_chosen: the model has the latter.
        ema_state: ``decay`` and ``num_updates``.
        condition: tensors of the cond stage that no model of ours has.
        shares_first_stage: the cond stage is a copy of the first stage.
        new_attention_order: of packed projections.
    """

    root: Mapping[str, Tensor] = field(default_factory=dict)
    scale_dtype: torch.dtype | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    averages_chosen: bool = False
    ema_state: Mapping[str, Tensor] = field(default_factory=dict)
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    shares_first_stage: bool = False
    new_attention_order: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> FileLayout:
        return self


@dataclass(frozen=True)
class WholeModel:
    """The parts of a latent diffusion model.

    Attributes:
        first_stage, unet: in eval mode.
        conditioner: or None.
        scheduler_fields: the config of a `DDIMScheduler`; None where the caller has a scheduler.
        arguments: of the constructor of `LatentDiffusion`, beside the parts.
        loss_fields: of `DiffusionLossConfig`.
        logvar: the learned log-variance, [T], or None.
        layout: see there.
    """

    first_stage: nn.Module
    unet: nn.Module
    conditioner: nn.Module | None
    scheduler_fields: dict[str, Any] | None
    arguments: dict[str, Any]
    loss_fields: dict[str, Any]
    logvar: Tensor | None
    layout: FileLayout


def load_whole_model(
    source: Source,
    config: ConfigSource | None = None,
    use_ema: bool | None = None,
    torch_dtype: torch.dtype | None = None,
    replaced: Mapping[str, Any] = {},
) -> WholeModel:
    """Load all parts but those that are `replaced` by the caller's.

    Args:
        source, config, use_ema, torch_dtype: as of `ModelMixin.from_single_file`.
        replaced: parts by the names of `WholeModel`, and ``scheduler``.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, lacks a part or has one too many,
            or its weights belong to another architecture.
        ConfigError: the config has a name or value that fastldm does not know.
    """
    said = read_config(config)
    if said is not None and not isinstance(said, LDMParams):
        raise ConfigError("config: expected CompVis's YAML file of the whole model")
    given = Given(said, None, {}, use_ema, torch_dtype)
    diffusion = None if said is None else said.diffusion
    if said is not None and diffusion is None:
        raise ConfigError("config: a YAML file of one part; expected that of the whole model")
    if said is not None and said.unsupported:
        raise ConfigError(
            f"{', '.join(said.unsupported)}: LatentDiffusion has no such part; load the UNet and "
            "the first stage by from_single_file of their classes"
        )
    file = split_file(source)
    if file.embedders:
        raise ConfigError(
            f"{file.source}: SDXL's conditioner, which LatentDiffusion has no part for; load the "
            "UNet and the first stage by from_single_file of their classes, its text encoders by "
            "fastldm.checkpoints.load_text_encoders, and put them into StableDiffusionXLPipeline"
        )
    if file.others or file.is_bare:
        raise CheckpointError(
            f"{file.source}: not a whole model that fastldm knows, but "
            f"{', '.join(file.others[:3]) or 'one part of it'}"
        )
    unet = replaced.get("unet") or _load_unet(file, given)
    first_stage = replaced.get("first_stage") or _load_first_stage(file, given)
    rest: dict[str, Tensor] = {}
    shares = False
    conditioner = replaced.get("conditioner")
    if conditioner is None:
        conditioner, rest, shares = _load_condition(file, given)
    conditioning = _conditioning(said, unet, first_stage, conditioner)
    arguments: dict[str, Any] = {
        "conditioning": conditioning,
        "scaling_factor": scaling_factor(file, given, type(first_stage).__name__),
    }
    if isinstance(conditioner, TextEncoder):
        arguments["max_caption_length"] = conditioner.max_length
    if diffusion is not None:
        arguments["train_conditioner"] = diffusion.cond_stage_trainable
    loss_fields, logvar = _loss(diffusion, file)
    scheduler = None
    if "scheduler" not in replaced:
        if diffusion is None and is_open_clip(file.condition):
            raise ConfigError(
                f"{file.source}: a Stable Diffusion 2 file does not say whether the UNet predicts "
                "ε or v; give its YAML file as config=, or scheduler="
            )
        scheduler = scheduler_fields(file.root, diffusion, file.source)
    names = [row.theirs for row in model_rows(unet, new_attention_order(given))]
    layout = FileLayout(
        root={name: tensor for name, tensor in file.root.items() if name != "scale_factor"},
        scale_dtype=file.root["scale_factor"].dtype if "scale_factor" in file.root else None,
        weights=file.unet,
        averages=file.weights_of_unet(True, names) if file.averages else {},
        averages_chosen=uses_ema(file, given),
        ema_state=file.ema_state,
        condition=rest,
        shares_first_stage=shares,
        new_attention_order=new_attention_order(given),
    )
    return WholeModel(
        first_stage, unet, conditioner, scheduler, arguments, loss_fields, logvar, layout
    )


def _load_unet(file: SingleFile, given: Given) -> ModelMixin:
    class_name, _ = unet_fields(file, given)
    return load_unet(_MODELS[class_name], file, given)


def _load_first_stage(file: SingleFile, given: Given) -> ModelMixin:
    class_name, _ = first_stage_fields(file, given)
    return load_first_stage(_MODELS[class_name], file, given)


def _load_condition(
    file: SingleFile, given: Given
) -> tuple[nn.Module | None, dict[str, Tensor], bool]:
    """The conditioner, tensors that it does not take, and whether it is the first stage."""
    condition = None if given.params is None else given.params.condition
    if condition == FIRST_STAGE or (condition is None and _is_first_stage(file.condition)):
        _check_copy(file)
        return None, {}, True
    leaves_as_is = isinstance(condition, ConditionParams) and condition_class(condition) is None
    if condition == UNCONDITIONAL or leaves_as_is:
        if file.condition:
            raise CheckpointError(
                f"{file.source}: the config says that there are no weights of a cond stage, the "
                f"file has {', '.join(list(file.condition)[:3])}"
            )
        return None, {}, False
    if condition is None and not file.condition:
        return None, {}, False
    class_name, fields = condition_fields(file, given)
    if class_name in _MODELS:
        return load_conditioner(_MODELS[class_name], file, given), {}, False
    model = load_clip(file.condition, fields["layer"], file.source, given.torch_dtype)
    places = conditioner_places(model, is_open_clip(file.condition))
    used = {row.theirs for row in make_rows(places, model.state_dict())}
    rest = {name: tensor for name, tensor in file.condition.items() if name not in used}
    return model, rest, False


def _is_first_stage(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.conv_in.weight" in tensors


def _check_copy(file: SingleFile) -> None:
    """A cond stage that is the first stage has the same weights under other names."""
    condition = {name: t for name, t in file.condition.items() if not name.startswith("loss.")}
    differing = [
        name
        for name in {**file.first_stage, **condition}
        if name not in file.first_stage
        or name not in condition
        or not _same(file.first_stage[name], condition[name])
    ]
    if condition and differing:
        raise CheckpointError(
            f"{file.source}: the cond stage is to be the first stage, but differs in "
            f"{', '.join(differing[:3])}"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    if first.is_meta or second.is_meta:
        return first.shape == second.shape
    return torch.equal(first, second)


def _conditioning(
    params: LDMParams | None, unet: Any, first_stage: Any, conditioner: nn.Module | None
) -> str:
    """The kind of conditioning in `LatentDiffusion`."""
    diffusion = None if params is None else params.diffusion
    if params is None or diffusion is None:
        kind = _inferred_conditioning(unet, first_stage)
    elif params.condition in (None, UNCONDITIONAL):
        kind = "none"
    else:
        key = diffusion.conditioning_key or ("concat" if diffusion.concat_mode else "crossattn")
        if key not in _CONDITIONING:
            raise ConfigError(
                f"conditioning_key: expected one of {', '.join(_CONDITIONING)}, got {key!r:.60}"
            )
        kind = _CONDITIONING[key]
    is_class = kind == "crossattn" and isinstance(conditioner, ClassEmbedder)
    return "class" if is_class else kind


def _inferred_conditioning(unet: Any, first_stage: Any) -> str:
    appends = unet.config["in_channels"] > first_stage.latent_channels
    if isinstance(unet, UNet2DConditionModel):
        return "hybrid" if appends else "crossattn"
    if appends:
        return "concat"
    return "class" if unet.config["num_class_embeds"] is not None else "none"


def _loss(
    diffusion: DiffusionParams | None, file: SingleFile
) -> tuple[dict[str, Any], Tensor | None]:
    """Fields of the loss, and its learned log-variance."""
    logvar = file.root.get("logvar")
    if diffusion is None:
        # Stability's files carry the constant, which is not learned.
        learned = logvar is not None and not logvar.is_meta and bool(logvar.max() > logvar.min())
        return ({"learn_logvar": True} if learned else {}), (logvar if learned else None)
    fields = {name: getattr(diffusion, name) for name in _LOSS_FIELDS}
    if not diffusion.learn_logvar:
        return fields, None
    if logvar is None:
        raise CheckpointError(f"{file.source}: holds no logvar, which the config says is learned")
    return fields, logvar
