"""CompVis's YAML file of a whole model: which parts it has, and how the diffusion is set up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastldm.checkpoints import first_stage_params as first_stages
from fastldm.checkpoints.first_stage_params import FirstStageParams, parse_first_stage
from fastldm.checkpoints.unet_params import IGNORED as UNET_IGNORED
from fastldm.checkpoints.unet_params import UNetParams
from fastldm.checkpoints.yaml_files import child, parse_fields, short
from fastldm.errors import ConfigError

UNCONDITIONAL = "__is_unconditional__"
FIRST_STAGE = "__is_first_stage__"

_PART_NAMES = frozenset({"unet_config", "first_stage_config", "cond_stage_config"})
_IGNORED = frozenset(
    {
        "c_concat_log_end",
        "c_concat_log_start",
        "ckpt_path",
        "clip_denoised",
        "concat_keys",
        "cond_stage_forward",
        "cond_stage_key",
        "finetune_keys",
        "first_stage_key",
        "force_null_conditioning",
        "ignore_keys",
        "keep_finetune_dims",
        "load_only_unet",
        "log_every_t",
        "make_it_fit",
        "masked_image_key",
        "monitor",
        "num_timesteps_cond",
        "reset_ema",
        "reset_num_ema_updates",
        "scheduler_config",
        "ucg_training",
        "use_positional_encodings",
    }
)
"""Arguments about data, logging and training, which do not change what a model gives."""


_ENGINE_IGNORED = frozenset(
    {
        "ckpt_path",
        "compile_model",
        "denoiser_config",
        "disable_first_stage_autocast",
        "ema_decay_rate",
        "en_and_decode_n_samples_a_time",
        "first_stage_config",
        "input_key",
        "log_keys",
        "loss_fn_config",
        "network_config",
        "network_wrapper",
        "no_cond_log",
        "optimizer_config",
        "sampler_config",
        "scheduler_config",
    }
)
"""The same of Stability's DiffusionEngine; its denoiser is that of ε with this schedule."""
_ENGINE_SCHEDULE = (0.00085, 0.012)


@dataclass(frozen=True)
class DiffusionParams:
    """Arguments of DDPM and LatentDiffusion that shape the model, with their defaults."""

    timesteps: int = 1000
    beta_schedule: str = "linear"
    linear_start: float = 1e-4
    linear_end: float = 2e-2
    cosine_s: float = 8e-3
    given_betas: tuple[float, ...] | None = None
    parameterization: str = "eps"
    loss_type: str = "l2"
    l_simple_weight: float = 1.0
    original_elbo_weight: float = 0.0
    v_posterior: float = 0.0
    learn_logvar: bool = False
    logvar_init: float = 0.0
    scale_factor: float = 1.0
    scale_by_std: bool = False
    use_ema: bool = True
    conditioning_key: str | None = None
    concat_mode: bool = True
    cond_stage_trainable: bool = False
    image_size: int | tuple[int, ...] | None = None
    channels: int | None = None


@dataclass(frozen=True)
class ConditionParams:
    """A cond stage: the last part of its ``target``, and its arguments."""

    target: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class LDMParams:
    """What such a file says; parts that it does not mention are None.

    Attributes:
        condition: its cond stage, or `UNCONDITIONAL` or `FIRST_STAGE`.
        unsupported: parts of a model that fastldm's `LatentDiffusion` does not have.
    """

    diffusion: DiffusionParams | None = None
    unet: UNetParams | None = None
    first_stage: FirstStageParams | None = None
    condition: ConditionParams | str | None = None
    unsupported: tuple[str, ...] = ()


def parse_ldm(config: Mapping[str, Any]) -> LDMParams:
    """From a YAML file of CompVis, or from its ``model`` node alone.

    Raises:
        ConfigError: it is no such file, or an argument is unknown or of another type.
    """
    node = child(config, "model", "config") or config
    where = "config"
    params = child(node, "params", where)
    target = _last_part(node.get("target"), where) if "target" in node else ""
    if not params:
        raise ConfigError(
            "config: expected a YAML file of CompVis, with model.params, got "
            f"{', '.join(map(short, list(config)[:5])) or 'nothing'}"
        )
    if target == "UNetModel":
        return LDMParams(unet=_parse_unet(params, "params"))
    if "ddconfig" in params:
        kind = first_stages.CLASSES.get(target)
        if kind is None:
            kind = "VQModel" if "n_embed" in params else "AutoencoderKL"
        return LDMParams(first_stage=parse_first_stage(kind, params, "params"))
    if "network_config" in params:
        return _parse_engine(params)
    if "unet_config" not in params:
        return LDMParams(condition=ConditionParams(target, params))
    return _parse_parts(params)


def _parse_parts(params: Mapping[str, Any]) -> LDMParams:
    # Sub-models of Stability's variants (low-scale, depth, noise augmentation) end in _config.
    unsupported = tuple(
        str(name)
        for name, value in params.items()
        if str(name).endswith("_config")
        and name not in _PART_NAMES | {"scheduler_config"}
        and isinstance(value, Mapping)
    )
    diffusion = parse_fields(
        DiffusionParams,
        {name: value for name, value in params.items() if name not in unsupported},
        "params",
        _IGNORED | _PART_NAMES | {"low_scale_key", "noise_level_key"},
    )
    unet = child(params, "unet_config", "params")
    first_stage = child(params, "first_stage_config", "params")
    return LDMParams(
        diffusion,
        _parse_unet(child(unet, "params", "params.unet_config"), "params.unet_config.params"),
        _parse_first_stage(first_stage) if first_stage else None,
        _parse_condition(params.get("cond_stage_config")),
        unsupported,
    )


@dataclass(frozen=True)
class _Engine:
    """Arguments of DiffusionEngine, Stability's class for SDXL."""

    scale_factor: float = 1.0
    use_ema: bool = False


def _parse_engine(params: Mapping[str, Any]) -> LDMParams:
    engine = parse_fields(
        _Engine,
        {name: value for name, value in params.items() if name != "conditioner_config"},
        "params",
        _ENGINE_IGNORED,
    )
    network = child(params, "network_config", "params")
    first_stage = child(params, "first_stage_config", "params")
    return LDMParams(
        DiffusionParams(
            linear_start=_ENGINE_SCHEDULE[0],
            linear_end=_ENGINE_SCHEDULE[1],
            scale_factor=engine.scale_factor,
            use_ema=engine.use_ema,
        ),
        _parse_unet(child(network, "params", "params.network_config"), "params.network_config"),
        _parse_first_stage(first_stage) if first_stage else None,
        unsupported=("conditioner_config",),
    )


def _parse_unet(params: Mapping[str, Any], where: str) -> UNetParams:
    return parse_fields(UNetParams, params, where, UNET_IGNORED)


def _parse_first_stage(node: Mapping[str, Any]) -> FirstStageParams:
    where = "params.first_stage_config"
    target = _last_part(node.get("target"), where)
    kind = first_stages.CLASSES.get(target)
    if kind is None:
        raise ConfigError(
            f"{where}.target: fastldm has no {target!r:.60}; accepted: "
            f"{', '.join(first_stages.CLASSES)}"
        )
    return parse_first_stage(kind, child(node, "params", where), f"{where}.params")


def _parse_condition(node: Any) -> ConditionParams | str | None:
    where = "params.cond_stage_config"
    if node is None or node in (UNCONDITIONAL, FIRST_STAGE):
        return node
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {short(node)}")
    return ConditionParams(_last_part(node.get("target"), where), child(node, "params", where))


def _last_part(target: Any, where: str) -> str:
    """``ClassEmbedder`` of ``ldm.modules.encoders.modules.ClassEmbedder``."""
    if not isinstance(target, str):
        raise ConfigError(f"{where}.target: expected a dotted name, got {short(target)}")
    return target.rpartition(".")[2]
