"""Fused operators: the only import surface of `fastldm.ops`.

Each operator is one function; which backend computes it is chosen from the call's metadata, see
`backend` and `explain`.
"""

from __future__ import annotations

from fastldm.ops import _schema as _schema  # defines torch.ops.fastldm
from fastldm.ops._dispatch import BACKENDS, OPERATORS, backend, explain
from fastldm.ops.cross_attention.functional import cross_attention
from fastldm.ops.diffusion_step.coefficients import (
    LEARNED_VARIANCE_TYPES,
    VARIANCE_TYPES,
    DDIMCoefficient,
    DDPMCoefficient,
    ddim_coefficients,
    ddpm_coefficients,
)
from fastldm.ops.diffusion_step.functional import (
    PREDICTION_TYPES,
    DiffusionStepOutput,
    ddim_step,
    ddpm_step,
    dynamic_threshold,
    predict_original_sample,
)
from fastldm.ops.geglu.functional import geglu
from fastldm.ops.group_norm_silu.functional import group_norm_silu
from fastldm.ops.vector_quantize.functional import (
    CodebookStatistics,
    VectorQuantizeOutput,
    codebook_statistics,
    vector_quantize,
)

__all__ = [
    "BACKENDS",
    "LEARNED_VARIANCE_TYPES",
    "OPERATORS",
    "PREDICTION_TYPES",
    "VARIANCE_TYPES",
    "CodebookStatistics",
    "DDIMCoefficient",
    "DDPMCoefficient",
    "DiffusionStepOutput",
    "VectorQuantizeOutput",
    "backend",
    "codebook_statistics",
    "cross_attention",
    "ddim_coefficients",
    "ddim_step",
    "ddpm_coefficients",
    "ddpm_step",
    "dynamic_threshold",
    "explain",
    "geglu",
    "group_norm_silu",
    "predict_original_sample",
    "vector_quantize",
]
