"""The noise schedule of a single file: its buffers, and the config of a scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm.checkpoints.ldm_params import DiffusionParams
from fastldm.checkpoints.splitting import SCHEDULE_NAMES
from fastldm.errors import CheckpointError, ConfigError
from fastldm.schedulers.betas import make_betas

_SCHEDULES = {
    # CompVis's name: ours
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "sqrt": "sqrt",
    "cosine": "squaredcos_cap_v2",
}
_COSINE_S = 8e-3
_PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_SAMPLING = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "uniform",
}
"""How CompVis's DDIM sampler goes through the time steps, in diffusers' fields."""
_MOST_TIMESTEPS = 100_000
_ROUNDINGS = 16
"""Of the file's dtype, by which β may differ from those of a schedule."""


def scheduler_fields(
    root: Mapping[str, Tensor], params: DiffusionParams | None, source: str
) -> dict[str, Any]:
    """The config of the `DDIMScheduler` with the schedule of a file.

    The file's ``betas`` decide where they differ from what the YAML file says, as they do when
    CompVis loads it.

    Raises:
        CheckpointError: the buffers are no schedule.
        ConfigError: the YAML file says something that is none.
    """
    fields: dict[str, Any] = {"schedule_dtype": "float64", **_SAMPLING}
    stated = None if params is None else stated_schedule(params)
    if params is not None:
        if params.parameterization not in _PREDICTION_TYPES:
            raise ConfigError(
                f"parameterization: expected one of {', '.join(_PREDICTION_TYPES)}, got "
                f"{params.parameterization!r:.60}"
            )
        fields["prediction_type"] = _PREDICTION_TYPES[params.parameterization]
    betas = _stored_betas(root, source)
    if betas is None or betas.is_meta:
        if stated is None:
            raise CheckpointError(
                f"{source}: holds no noise schedule (betas); give config= or scheduler="
            )
        return fields | stated
    if stated is not None and _agrees(stated, betas):
        return fields | stated
    return fields | recognise_betas(betas)


def stated_schedule(params: DiffusionParams) -> dict[str, Any]:
    """The scheduler's fields for a YAML file's schedule.

    Raises:
        ConfigError: it names no schedule, or a number is out of range.
    """
    if not 1 <= params.timesteps <= _MOST_TIMESTEPS:
        raise ConfigError(f"timesteps: expected 1 to {_MOST_TIMESTEPS}, got {params.timesteps}")
    fields: dict[str, Any] = {"num_train_timesteps": params.timesteps}
    if params.given_betas is not None:
        return {**fields, "trained_betas": list(params.given_betas)}
    if params.beta_schedule not in _SCHEDULES:
        raise ConfigError(
            f"beta_schedule: expected one of {', '.join(_SCHEDULES)}, got "
            f"{params.beta_schedule!r:.60}"
        )
    if params.beta_schedule == "cosine" and params.cosine_s != _COSINE_S:
        raise ConfigError(f"cosine_s: expected {_COSINE_S}, got {params.cosine_s}")
    fields["beta_schedule"] = _SCHEDULES[params.beta_schedule]
    if params.beta_schedule != "cosine":
        fields |= {"beta_start": params.linear_start, "beta_end": params.linear_end}
    return fields


def recognise_betas(betas: Tensor) -> dict[str, Any]:
    """The scheduler's fields that give these β, [T]; where none does, the β themselves."""
    ends = [_shortest(betas[index]) for index in (0, -1)]
    for schedule in _SCHEDULES.values():
        fields: dict[str, Any] = {
            "num_train_timesteps": len(betas),
            "beta_schedule": schedule,
        }
        if schedule == "sqrt":
            ends = [_shortest(betas[index] ** 2) for index in (0, -1)]
        if schedule != "squaredcos_cap_v2":
            fields |= {"beta_start": ends[0], "beta_end": ends[1]}
        if _agrees(fields, betas):
            return fields
    return {"num_train_timesteps": len(betas), "trained_betas": betas.double().tolist()}


def _shortest(value: Tensor) -> float:
    """The number with the fewest digits that rounds to `value`."""
    return float(str(value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()))


def _stored_betas(root: Mapping[str, Tensor], source: str) -> Tensor | None:
    """β of the file, [T]."""
    betas, cumulative = root.get("betas"), root.get("alphas_cumprod")
    if betas is None and cumulative is None:
        return None
    for name, tensor in (("betas", betas), ("alphas_cumprod", cumulative)):
        if tensor is not None and (
            tensor.ndim != 1
            or not 1 <= len(tensor) <= _MOST_TIMESTEPS
            or not tensor.is_floating_point()
            or not (tensor.is_meta or bool(((tensor >= 0) & (tensor <= 1)).all()))
        ):
            raise CheckpointError(f"{source}: {name} is not numbers from 0 to 1, [T]")
    if betas is None:
        assert cumulative is not None
        alphas = cumulative.double()
        return 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    if cumulative is not None and not betas.is_meta:
        product = (1 - betas.double()).cumprod(dim=0)
        if len(product) != len(cumulative) or not torch.allclose(
            product,
            cumulative.double(),
            rtol=0.01,
            atol=max(1e-4, 8 * torch.finfo(betas.dtype).eps),
        ):
            raise CheckpointError(f"{source}: alphas_cumprod is not that of its betas")
    return betas


def _agrees(fields: Mapping[str, Any], betas: Tensor) -> bool:
    """Whether fields give these β up to the rounding of the file's dtype."""
    try:
        made = make_betas(
            fields.get("beta_schedule", "linear"),
            fields.get("beta_start", 0.0),
            fields.get("beta_end", 0.0),
            fields["num_train_timesteps"],
            fields.get("trained_betas"),
            dtype=torch.float64,
        )
    except ConfigError:
        return False
    tolerance = _ROUNDINGS * torch.finfo(betas.dtype).eps
    return len(made) == len(betas) and torch.allclose(
        made, betas.double(), rtol=tolerance, atol=0.0
    )


def schedule_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of CompVis's DDPM for a scheduler's config.

    Raises:
        ConfigError: CompVis's models have no such schedule.
    """
    predicted = {ours: theirs for theirs, ours in _PREDICTION_TYPES.items()}
    arguments: dict[str, Any] = {
        "timesteps": config["num_train_timesteps"],
        "parameterization": predicted[config["prediction_type"]],
    }
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    if config.get("trained_betas") is not None or config["beta_schedule"] not in names:
        return {**arguments, "given_betas": betas_of(config).tolist()}
    arguments["beta_schedule"] = names[config["beta_schedule"]]
    if arguments["beta_schedule"] != "cosine":
        arguments |= {"linear_start": config["beta_start"], "linear_end": config["beta_end"]}
    return arguments


def betas_of(config: Mapping[str, Any]) -> Tensor:
    """β of a scheduler's config in float64, [T].

    Raises:
        ConfigError: CompVis's models have no such schedule.
    """
    if config.get("rescale_betas_zero_snr"):
        raise ConfigError("rescale_betas_zero_snr: CompVis's schedules have no such option")
    return make_betas(
        config["beta_schedule"],
        config["beta_start"],
        config["beta_end"],
        config["num_train_timesteps"],
        config.get("trained_betas"),
        dtype=torch.float64,
    )


def is_schedule_of(root: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a file's buffers are those of a scheduler with this config."""
    betas = _stored_betas(root, "") if root else None
    return betas is not None and not betas.is_meta and _agrees(config, betas)


def schedule_buffers(betas: Tensor, v_posterior: float = 0.0) -> dict[str, Tensor]:
    """The buffers that CompVis's DDPM registers, in its order.

    Args:
        betas: [T]; computed in float64 as there, with numpy.
        v_posterior: the posterior variance is (1−v)·β̃ + v·β.

    Returns:
        float32, [T] each.
    """
    beta = betas.detach().cpu().double().numpy()
    alpha = 1.0 - beta
    cumulative = np.cumprod(alpha, axis=0)
    previous = np.append(1.0, cumulative[:-1])
    variance = (1 - v_posterior) * beta * (1.0 - previous) / (1.0 - cumulative)
    variance = variance + v_posterior * beta
    values = (
        beta,
        cumulative,
        previous,
        np.sqrt(cumulative),
        np.sqrt(1.0 - cumulative),
        np.log(1.0 - cumulative),
        np.sqrt(1.0 / cumulative),
        np.sqrt(1.0 / cumulative - 1),
        variance,
        np.log(np.maximum(variance, 1e-20)),
        beta * np.sqrt(previous) / (1.0 - cumulative),
        (1.0 - previous) * np.sqrt(alpha) / (1.0 - cumulative),
    )
    return {
        name: torch.tensor(value, dtype=torch.float32)
        for name, value in zip(SCHEDULE_NAMES, values, strict=True)
    }
