"""`LatentDiffusion` from and to a single file in CompVis's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastldm.checkpoints.whole_model import FileLayout, load_whole_model
from fastldm.checkpoints.whole_saving import Saved, whole_state_dict
from fastldm.checkpoints.writing import check_path, write_single_file
from fastldm.checkpoints.yaml_writing import whole_yaml, write_yaml
from fastldm.errors import CheckpointError, ConfigError
from fastldm.losses.diffusion import DiffusionLossConfig
from fastldm.schedulers import DDIMScheduler

if TYPE_CHECKING:
    from fastldm.latent_diffusion.model import LatentDiffusion

_Model = TypeVar("_Model", bound="LatentDiffusion")

_PARTS = ("first_stage", "unet", "conditioner", "scheduler")
_LOSS_NAMES = (
    "l_simple_weight",
    "original_elbo_weight",
    "v_posterior",
    "learn_logvar",
    "logvar_init",
)


def load_single_file(
    kind: type[_Model],
    source: str | Path | Mapping[str, Tensor],
    config: str | Path | Mapping[str, Any] | None,
    use_ema: bool | None,
    torch_dtype: torch.dtype | None,
    parts: Mapping[str, Any],
) -> _Model:
    """See `LatentDiffusion.from_single_file`."""
    replaced = {name: parts[name] for name in _PARTS if parts.get(name) is not None}
    arguments = {name: value for name, value in parts.items() if name not in _PARTS}
    whole = load_whole_model(source, config, use_ema, torch_dtype, replaced)
    scheduler = replaced.get("scheduler")
    if scheduler is None:
        scheduler = DDIMScheduler(**(whole.scheduler_fields or {}))
    arguments.setdefault("loss", DiffusionLossConfig(**whole.loss_fields))
    try:
        model = kind(
            whole.first_stage,
            whole.unet,
            scheduler,
            whole.conditioner,
            **{**whole.arguments, **arguments},
        )
    except TypeError as error:
        raise ConfigError(f"from_single_file: {error}") from None
    if whole.logvar is not None and model.objective.logvar is not None:
        _set_logvar(model.objective.logvar, whole.logvar)
    model.file_layout = whole.layout
    return model.eval()


def _set_logvar(own: nn.Parameter, logvar: Tensor) -> None:
    if logvar.shape != own.shape or not logvar.is_floating_point():
        raise CheckpointError(
            f"logvar: is {list(logvar.shape)} in the file, {list(own.shape)} in the model"
        )
    if not logvar.is_meta:
        # A file in float64 keeps its digits.
        own.data = logvar.to(own.device, torch.promote_types(own.dtype, logvar.dtype), copy=True)


def save_single_file(
    model: LatentDiffusion,
    path: str | Path,
    config_path: str | Path | None,
    unet: nn.Module | None,
    conditioner: nn.Module | None,
    ema: nn.Module | None,
) -> None:
    """See `LatentDiffusion.save_single_file`."""
    path = check_path(path)
    scale = model.latent_scale
    if scale.mean is not None or scale.shift:
        raise ConfigError(
            "latent_mean, shift_factor: CompVis's latents have one factor and no shift"
        )
    objective = model.objective.config
    saved = Saved(
        unet=model.unet if unet is None else unet,
        first_stage=model.first_stage,
        conditioner=model.conditioner if conditioner is None else conditioner,
        scheduler=model.scheduler.config,
        scale_factor=scale.factor,
        logvar=model.objective.logvar,
        v_posterior=objective.v_posterior,
        ema=ema,
    )
    tensors = whole_state_dict(saved, model.file_layout)
    if config_path is not None:
        write_yaml(_config(model, saved, tensors), config_path)
    write_single_file(tensors, path)


def _config(model: LatentDiffusion, saved: Saved, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    loss = asdict(model.objective.config)
    if loss["loss_type"] == "huber" or loss["snr_gamma"] is not None:
        raise ConfigError("loss: CompVis's losses are 'l1' and 'l2', without weights by SNR")
    arguments = {
        "loss_type": loss["loss_type"],
        **{name: loss[name] for name in _LOSS_NAMES},
        "scale_factor": saved.scale_factor,
        "scale_by_std": "scale_factor" in tensors,
        "use_ema": "model_ema.decay" in tensors,
        "cond_stage_trainable": model.train_conditioner,
    }
    return whole_yaml(
        saved.unet,
        saved.first_stage,
        saved.conditioner,
        saved.scheduler,
        model.conditioning,
        arguments,
        model.file_layout or FileLayout(),
    )
