"""Every raw operator: its schema, its fake kernel, and where its kernels are.

Raw operators are private and carry no autograd; the functionals do. Each takes the name of the
backend that computes it, so the choice is made once, from metadata, where the functional is called
or traced, and a compiled graph keeps it. The gradient that a caller does not want is empty, [0].
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastldm.ops._layout import empty_like

_LIBRARY = torch.library.Library("fastldm", "DEF")
_MODULE_OF_BACKEND = {"triton": "triton_kernel", "cpp": "cpp", "reference": "reference"}
_FOLDER_OF_OPERATOR: dict[str, str] = {}


@functools.cache
def kernel(name: str, backend: str) -> Callable[..., Any]:
    """What computes a raw operator: a function of a backend's module, imported at its first call.

    Called straight, it passes by torch's dispatcher: see `fastldm.ops._direct`.
    """
    folder = _FOLDER_OF_OPERATOR[name]
    module = importlib.import_module(f"fastldm.ops.{folder}.{_MODULE_OF_BACKEND[backend]}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def _define(schema: str, fake: Callable[..., Any], *, folder: str) -> None:
    """Define ``fastldm::<schema>``; each backend's module has its kernel under the op's name."""
    name = schema.partition("(")[0]
    _FOLDER_OF_OPERATOR[name] = folder

    def call(*args: Any, backend: str, **kwargs: Any) -> Any:
        return kernel(name, backend)(*args, **kwargs)

    def call_fake(*args: Any, backend: str, **kwargs: Any) -> Any:
        return fake(*args, **kwargs)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastldm::{name}", call_fake, lib=_LIBRARY)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an operand is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _gradients(*operands: tuple[Tensor | None, bool], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        empty_like(operand) if operand is not None and wanted else like.new_empty(0)
        for operand, wanted in operands
    )


def _group_norm_silu_fwd(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = (x.shape[0], num_groups)
    dtype = compute_dtype(x)
    return (
        empty_like(x),
        x.new_empty(statistics, dtype=dtype),
        x.new_empty(statistics, dtype=dtype),
    )


def _group_norm_silu_bwd(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    operands = (x, weight, bias, channel_add, scale, shift)
    return _gradients(*zip(operands, wanted, strict=True), like=x)


def _cross_attention_fwd(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _cross_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape if want else 0) for x, want in zip((q, k, v), wanted, strict=True)
    )


def _geglu_fwd(hidden_states: Tensor) -> Tensor:
    return hidden_states.new_empty((*hidden_states.shape[:-1], hidden_states.shape[-1] // 2))


def _geglu_bwd(grad_y: Tensor, hidden_states: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _vector_quantize_fwd(
    z: Tensor, codebook: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*z.shape[:channel_dim], *z.shape[channel_dim + 1 :])
    return (
        torch.empty_like(z),
        z.new_empty(shape, dtype=torch.int64),
        z.new_empty((), dtype=compute_dtype(z, codebook)),
    )


def _vector_quantize_bwd(
    grad_z_q: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), codebook.new_empty(codebook.shape)


def _vector_quantize_statistics(
    z: Tensor, indices: Tensor, num_embeddings: int, channel_dim: int
) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(num_embeddings, dtype=torch.int64),
        z.new_empty((num_embeddings, z.shape[channel_dim]), dtype=compute_dtype(z)),
    )


def _step_fwd(sample: Tensor, *_: Any, return_original: bool, **__: Any) -> tuple[Tensor, Tensor]:
    original = torch.empty_like(sample) if return_original else sample.new_empty(0)
    return torch.empty_like(sample), original


_define(
    "group_norm_silu_fwd(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "bool silu, Tensor? channel_add, Tensor? residual, Tensor? scale, Tensor? shift, *, "
    "str backend) -> (Tensor y, Tensor mean, Tensor rstd)",
    _group_norm_silu_fwd,
    folder="group_norm_silu",
)
# `wanted` has one entry for each output, in order. Here the residual's gradient is that of x.
_define(
    "group_norm_silu_bwd(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, int num_groups, "
    "Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? channel_add, Tensor? residual, "
    "Tensor? scale, Tensor? shift, bool[] wanted, *, str backend) -> (Tensor x, Tensor weight, "
    "Tensor bias, Tensor channel_add, Tensor scale, Tensor shift)",
    _group_norm_silu_bwd,
    folder="group_norm_silu",
)
_define(
    "cross_attention_fwd(Tensor q, Tensor k, Tensor v, float scale, Tensor? key_mask, *, "
    "str backend) -> Tensor",
    _cross_attention_fwd,
    folder="cross_attention",
)
_define(
    "cross_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, float scale, "
    "Tensor? key_mask, bool[] wanted, *, str backend) -> (Tensor q, Tensor k, Tensor v)",
    _cross_attention_bwd,
    folder="cross_attention",
)
_define("geglu_fwd(Tensor hidden_states, *, str backend) -> Tensor", _geglu_fwd, folder="geglu")
_define(
    "geglu_bwd(Tensor grad_y, Tensor hidden_states, *, str backend) -> Tensor",
    _geglu_bwd,
    folder="geglu",
)
_define(
    "vector_quantize_fwd(Tensor z, Tensor codebook, int channel_dim, *, str backend) "
    "-> (Tensor z_q, Tensor indices, Tensor loss)",
    _vector_quantize_fwd,
    folder="vector_quantize",
)
_define(
    "vector_quantize_bwd(Tensor grad_z_q, Tensor grad_codebook_loss, "
    "Tensor grad_commitment_loss, Tensor z, Tensor codebook, Tensor indices, int channel_dim, *, "
    "str backend) -> (Tensor z, Tensor codebook)",
    _vector_quantize_bwd,
    folder="vector_quantize",
)
_define(
    "vector_quantize_statistics(Tensor z, Tensor indices, int num_embeddings, int channel_dim, *, "
    "str backend) -> (Tensor counts, Tensor sums)",
    _vector_quantize_statistics,
    folder="vector_quantize",
)
_define(
    "ddim_step_fwd(Tensor sample, Tensor model_output, Tensor coefficients, *, "
    "str prediction_type, float? clip_range, Tensor? threshold, bool use_clipped_model_output, "
    "Tensor? model_output_uncond, float guidance_scale, Tensor? guidance_scales, "
    "float guidance_rescale, Tensor? noise, Tensor? seed, Tensor? offset, "
    "bool return_original, str backend) -> (Tensor prev_sample, Tensor pred_original_sample)",
    _step_fwd,
    folder="diffusion_step",
)
_define(
    "ddpm_step_fwd(Tensor sample, Tensor model_output, Tensor coefficients, *, "
    "str prediction_type, float? clip_range, Tensor? threshold, str variance_type, "
    "Tensor? predicted_variance, Tensor? model_output_uncond, float guidance_scale, "
    "Tensor? guidance_scales, float guidance_rescale, Tensor? noise, Tensor? seed, "
    "Tensor? offset, bool return_original, str backend) "
    "-> (Tensor prev_sample, Tensor pred_original_sample)",
    _step_fwd,
    folder="diffusion_step",
)
