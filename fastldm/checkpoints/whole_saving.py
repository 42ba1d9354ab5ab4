"""All parts of a latent diffusion model as the tensors of one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.checkpoints.clip_encoder import is_open_clip
from fastldm.checkpoints.conditioner_keys import conditioner_places
from fastldm.checkpoints.keymap import make_rows, to_compvis
from fastldm.checkpoints.schedule import betas_of, is_schedule_of, schedule_buffers
from fastldm.checkpoints.single_file import check_expressible, compvis_state_dict, model_rows
from fastldm.checkpoints.splitting import (
    CONDITION_PREFIX,
    EMA_PREFIX,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    name_of_average,
)
from fastldm.checkpoints.whole_model import FileLayout

_DECAY = 0.9999


@dataclass(frozen=True)
class Saved:
    """What is to be written.

    Attributes:
        unet, first_stage, conditioner: the models.
        scheduler: config of the noise schedule.
        scale_factor: of the latents.
        logvar: the learned log-variance, or None.
        v_posterior: of the posterior variance among the buffers.
        ema: a UNet whose weights are written as the moving averages.
    """

    unet: nn.Module
    first_stage: nn.Module
    conditioner: nn.Module | None
    scheduler: Mapping[str, Any]
    scale_factor: float
    logvar: Tensor | None = None
    v_posterior: float = 0.0
    ema: nn.Module | None = None


def whole_state_dict(saved: Saved, layout: FileLayout | None) -> dict[str, Tensor]:
    """The tensors of the file, under CompVis's names.

    Args:
        layout: of the file that the model is from; what the model did not take from it is written
            as it was there. The UNet's other set of weights (raw or averaged) is left out where
            the UNet has changed since, and replaced by `saved.ema` where that is given.

    Raises:
        ConfigError: CompVis's layout cannot hold the model.
    """
    known = layout or FileLayout()
    tensors = _root(saved, layout)
    tensors.update(_unet(saved, known))
    first_stage = compvis_state_dict(saved.first_stage, FIRST_STAGE_PREFIX)
    tensors.update(first_stage)
    tensors.update(_condition(saved, known))
    if known.shares_first_stage:
        for name, tensor in first_stage.items():
            tensors[f"{CONDITION_PREFIX}{name.removeprefix(FIRST_STAGE_PREFIX)}"] = tensor
    return tensors


def _root(saved: Saved, layout: FileLayout | None) -> dict[str, Tensor]:
    if layout is not None and is_schedule_of(layout.root, saved.scheduler):
        root = dict(layout.root)
    else:
        root = schedule_buffers(betas_of(saved.scheduler), saved.v_posterior)
    if saved.logvar is not None:
        root["logvar"] = saved.logvar.detach()
    dtype = layout.scale_dtype if layout is not None else _default_scale_dtype(saved.scale_factor)
    if dtype is not None:
        root["scale_factor"] = torch.tensor(saved.scale_factor, dtype=dtype)
    return root


def _default_scale_dtype(factor: float) -> torch.dtype | None:
    """A factor of 1 needs no buffer."""
    return None if factor == 1.0 else torch.float32


def _unet(saved: Saved, layout: FileLayout) -> dict[str, Tensor]:
    """The UNet's weights, and moving averages of them."""
    check_expressible(saved.unet)
    rows = model_rows(saved.unet, layout.new_attention_order)
    weights = to_compvis(rows, saved.unet.state_dict())
    averages: Mapping[str, Tensor] = {}
    state: Mapping[str, Tensor] = layout.ema_state
    if saved.ema is not None:
        averages = to_compvis(
            model_rows(saved.ema, layout.new_attention_order), saved.ema.state_dict()
        )
    elif layout.averages and _unchanged(weights, layout):
        weights, averages = dict(layout.weights) or weights, layout.averages
    result = {f"{UNET_PREFIX}{name}": tensor for name, tensor in weights.items()}
    if not averages:
        return result
    count = state.get("num_updates", torch.tensor(0, dtype=torch.int32))
    result[f"{EMA_PREFIX}decay"] = state.get("decay", torch.tensor(_DECAY))
    result[f"{EMA_PREFIX}num_updates"] = count
    return result | {name_of_average(name): tensor for name, tensor in averages.items()}


def _unchanged(weights: Mapping[str, Tensor], layout: FileLayout) -> bool:
    """Whether the UNet still has the weights that were read."""
    read = layout.averages if layout.averages_chosen else layout.weights
    return all(
        weights[name].is_meta or torch.equal(weights[name].cpu().to(tensor.dtype), tensor.cpu())
        for name, tensor in read.items()
    )


def _condition(saved: Saved, layout: FileLayout) -> dict[str, Tensor]:
    if saved.conditioner is None:
        return {}
    state = saved.conditioner.state_dict()
    places = conditioner_places(saved.conditioner, is_open_clip(layout.condition))
    own = to_compvis(make_rows(places, state), state)
    return {
        f"{CONDITION_PREFIX}{name}": tensor for name, tensor in {**own, **layout.condition}.items()
    }
