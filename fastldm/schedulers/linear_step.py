"""Sampling steps that are linear in what the model predicts, the sample and further tensors.

Two fused operators make them: `ddim_step` is linear in x₀ and ε, `ddpm_step` in x₀ and the sample,
and both in a further tensor, which is noise in their own methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm.ops import (
    DDIMCoefficient,
    DDPMCoefficient,
    DiffusionStepOutput,
    ddim_step,
    ddpm_step,
)


def weighted_sum(
    weights: Iterable[float | Tensor], tensors: Iterable[Tensor], dtype: torch.dtype
) -> Tensor:
    """Σ weight·tensor in `dtype`; one weight, a number or a tensor [], for each tensor."""
    first, *others = (
        weight * tensor.to(dtype) for weight, tensor in zip(weights, tensors, strict=True)
    )
    for term in others:
        first = first + term
    return first


def ddim_rows(
    sqrt_alpha: Tensor, sqrt_beta: Tensor, original: Tensor, noise: Tensor, others: Tensor
) -> Tensor:
    """The scalars of steps ``original·x₀ + noise·ε + Σ other·tensor`` for `linear_step`.

    Args:
        sqrt_alpha, sqrt_beta: [N], by which `fastldm.ops.ddim_step` predicts x₀ and ε.
        original, noise: [N], factors of x₀ after it is limited, and of the ε that belongs to it.
        others: [N, M], factors of further tensors.

    Returns:
        float64 [N, 5 + M]: the coefficients of `ddim_step`, whose noise is the sum of the further
        tensors, and the factors in that sum.
    """
    columns = {
        DDIMCoefficient.SQRT_ALPHA: sqrt_alpha,
        DDIMCoefficient.SQRT_BETA: sqrt_beta,
        DDIMCoefficient.SQRT_ALPHA_PREV: original,
        DDIMCoefficient.DIRECTION: noise,
        DDIMCoefficient.SIGMA: _scale_of_sum(others),
    }
    return _pack(len(DDIMCoefficient), columns, others)


def ddpm_rows(
    sqrt_alpha: Tensor, sqrt_beta: Tensor, original: Tensor, sample: Tensor, others: Tensor
) -> Tensor:
    """The scalars of steps ``original·x₀ + sample·x + Σ other·tensor`` for `linear_step`.

    Args:
        sqrt_alpha, sqrt_beta: [N], by which `fastldm.ops.ddpm_step` predicts x₀.
        original, sample: [N], factors of x₀ after it is limited, and of the sample.
        others: [N, M], factors of further tensors.

    Returns:
        float64 [N, 7 + M]: the coefficients of `ddpm_step`, whose noise is the sum of the further
        tensors, and the factors in that sum.
    """
    columns = {
        DDPMCoefficient.SQRT_ALPHA: sqrt_alpha,
        DDPMCoefficient.SQRT_BETA: sqrt_beta,
        DDPMCoefficient.ORIGINAL: original,
        DDPMCoefficient.SAMPLE: sample,
        DDPMCoefficient.SIGMA: _scale_of_sum(others),
    }
    return _pack(len(DDPMCoefficient), columns, others)


def _scale_of_sum(others: Tensor) -> Tensor:
    # A single further tensor goes into the fused step as it is.
    return others[:, 0] if others.shape[1] == 1 else torch.ones_like(others[:, :1].sum(dim=1))


def _pack(width: int, columns: dict[Any, Tensor], others: Tensor) -> Tensor:
    rows = others.new_zeros(len(others), width, dtype=torch.float64)
    for position, values in columns.items():
        rows[:, position] = values
    return torch.cat((rows, others.double()), dim=1)


def linear_step(
    sample: Tensor,
    model_output: Tensor,
    row: Tensor,
    others: Sequence[Tensor | None],
    **options: Any,
) -> DiffusionStepOutput:
    """One step, fused but for the sum of several further tensors.

    Args:
        sample: x, [B, …].
        model_output: the model's prediction, shape of `sample`.
        row: from `ddim_rows` or `ddpm_rows`, on the device of `sample`.
        others: M tensors of the shape of `sample`; None stands for one whose factor is 0.
        options: prediction type, limits of x₀ and guidance, as in the operators.

    Returns:
        The sample after the step, and x₀ after it is limited.
    """
    width = len(row) - len(others)
    given = [index for index, other in enumerate(others) if other is not None]
    further = None
    if len(others) == 1:
        further = others[0]
    elif given:
        weights = row[width:].unbind()
        further = weighted_sum(
            [weights[index] for index in given],
            [other for other in others if other is not None],
            row.dtype,
        )
    if width == len(DDPMCoefficient):
        return ddpm_step(sample, model_output, row[:width], noise=further, **options)
    limited = options.get("clip_range") is not None or options.get("threshold") is not None
    return ddim_step(
        sample,
        model_output,
        row[:width],
        noise=further,
        use_clipped_model_output=limited,
        **options,
    )
