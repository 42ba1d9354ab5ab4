"""`ddim_step` and `ddpm_step`: checks, dispatch and documentation of the sampling steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.ops import _direct, _schema
from fastldm.ops._dispatch import choose, prefers_cpp
from fastldm.ops.diffusion_step import reference
from fastldm.ops.diffusion_step.coefficients import (
    LEARNED_VARIANCE_TYPES,
    VARIANCE_TYPES,
    DDIMCoefficient,
    DDPMCoefficient,
)

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

_WIDTHS = {"ddim_step": len(DDIMCoefficient), "ddpm_step": len(DDPMCoefficient)}
_SHAPED_AS_SAMPLE = ("model_output_uncond", "predicted_variance", "noise")
_TENSOR_OPTIONS = (*_SHAPED_AS_SAMPLE, "threshold", "guidance_scales", "seed", "offset")

# torch.quantile refuses more elements than this in one call.
_QUANTILE_LIMIT = 2**24 - 1


class DiffusionStepOutput(NamedTuple):
    """What a sampling step gives; the tensors have the sample's shape, dtype and strides."""

    prev_sample: Tensor
    """The sample at the time step that the step leads to."""
    pred_original_sample: Tensor
    """x₀ as predicted at this step, after clipping or thresholding."""


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
    threshold: Tensor | None = None,
    use_clipped_model_output: bool = False,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    guidance_rescale: float = 0.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    return_original: bool = True,
) -> DiffusionStepOutput:
    """One step of DDIM sampling (Song et al., 2010.02502, eq. 12), guidance folded in.

    With ᾱ the cumulative product of α (α in that paper) and all scalars from `coefficients`::

        out  = u + guidance_scale·(c − u)        c = model_output, u = model_output_uncond
        x₀   = (x − √(1−ᾱ_t)·out)/√ᾱ_t           prediction_type "epsilon"       (ε = out)
               out                                               "sample"        (ε from x₀)
               √ᾱ_t·x − √(1−ᾱ_t)·out                             "v_prediction"
                                                        (ε = √ᾱ_t·out + √(1−ᾱ_t)·x)
        x₀'  = clamp(x₀, ±clip_range)  or  clamp(x₀, ±threshold)/threshold
        prev = √ᾱ_prev·x₀' + √(1−ᾱ_prev−σ²)·ε + σ·noise

    Computed in float32, or in float64 for a float64 sample; half precisions are rounded once, at
    the end. Where a gradient is wanted the step is differentiable in every floating input.

    Args:
        sample: x_t, [B, …], floating, any layout.
        model_output: the model's prediction, shape of `sample`, any floating dtype.
        coefficients: [5], or [B, 5] for a time step a sample, from `ddim_coefficients`, on the
            device of `sample`.
        prediction_type: ``"epsilon"`` (noise), ``"sample"`` (x₀) or ``"v_prediction"``
            (v = √ᾱ·ε − √(1−ᾱ)·x₀, 2202.00512).
        clip_range: largest magnitude of x₀.
        threshold: [B], dynamic thresholds of x₀ from `dynamic_threshold`; not with `clip_range`.
        use_clipped_model_output: take ε anew from x₀'.
        model_output_uncond: the unconditional half of classifier-free guidance (2207.12598),
            shape of `sample`; `model_output` is then the conditional half.
        guidance_scale: a number, or a tensor [] or [B]; a tensor may change between replays of a
            captured graph. Without `model_output_uncond` it has no effect.
        guidance_rescale: φ of 2305.08891, section 3.4.
        noise: standard normal noise, shape of `sample`. Without `noise` and `seed` none is added.
        seed: draw the noise inside instead: an int, or an int64 tensor [1] or [B] with one seed a
            sample. Philox 4x32-10, as `fastldm.ops.diffusion_step.reference.philox_normal` says.
        offset: with `seed`: an int or int64 tensor [], different at every step.
        return_original: give ``pred_original_sample``; without it a step writes half as much.

    Returns:
        ``(prev_sample, pred_original_sample)``, both with the shape, dtype and strides of `sample`;
        the latter is empty, [0], where it is not wanted.

    Raises:
        ConfigError: an argument has a shape, dtype, device or value that is not accepted, or two
            arguments exclude each other; the message names it.
    """
    scale, scales = _split_scale(guidance_scale)
    seeds, position = _philox_state(sample, seed, offset)
    return _step(
        "ddim_step",
        sample,
        model_output,
        coefficients,
        {
            "prediction_type": prediction_type,
            "clip_range": clip_range,
            "threshold": threshold,
            "use_clipped_model_output": use_clipped_model_output,
            "model_output_uncond": model_output_uncond,
            "guidance_scale": scale,
            "guidance_scales": scales,
            "guidance_rescale": guidance_rescale,
            "noise": noise,
            "seed": seeds,
            "offset": position,
            "return_original": return_original,
        },
    )


def ddpm_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
    threshold: Tensor | None = None,
    variance_type: str = "fixed_small",
    predicted_variance: Tensor | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    guidance_rescale: float = 0.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    return_original: bool = True,
) -> DiffusionStepOutput:
    """One ancestral step of DDPM (Ho et al., 2006.11239, eq. 7 and 15), guidance folded in.

    With x₀' predicted and limited as in `ddim_step`, and all scalars from `coefficients`::

        prev = √ᾱ_prev·β_t/(1−ᾱ_t)·x₀' + √α_t·(1−ᾱ_prev)/(1−ᾱ_t)·x + σ·noise

    σ is a coefficient for the fixed variances. A learned variance v = `predicted_variance` makes
    it √v (``"learned"``) or exp(½·(f·log β_t + (1−f)·log β̃_t)) with f = (v+1)/2
    (``"learned_range"``, 2102.09672, eq. 15).

    Computed in float32, or in float64 for a float64 sample; half precisions are rounded once, at
    the end. Where a gradient is wanted the step is differentiable in every floating input.

    Args:
        sample: x_t, [B, …], floating, any layout.
        model_output: the model's prediction, shape of `sample`, any floating dtype.
        coefficients: [7], or [B, 7] for a time step a sample, from `ddpm_coefficients` with the
            same `variance_type`, on the device of `sample`.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``, as in `ddim_step`.
        clip_range: largest magnitude of x₀.
        threshold: [B], dynamic thresholds of x₀ from `dynamic_threshold`; not with `clip_range`.
        variance_type: one of `fastldm.ops.diffusion_step.coefficients.VARIANCE_TYPES`.
        predicted_variance: the model's v, shape of `sample`; for the learned variances, which
            need it where noise is added.
        model_output_uncond, guidance_scale, guidance_rescale: as in `ddim_step`.
        noise, seed, offset, return_original: as in `ddim_step`.

    Returns:
        ``(prev_sample, pred_original_sample)``, both with the shape, dtype and strides of `sample`;
        the latter is empty, [0], where it is not wanted.

    Raises:
        ConfigError: an argument has a shape, dtype, device or value that is not accepted, or two
            arguments exclude each other; the message names it.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ConfigError(
            f"variance_type: got {variance_type!r}; accepted: {', '.join(VARIANCE_TYPES)}"
        )
    adds_noise = noise is not None or seed is not None
    if variance_type in LEARNED_VARIANCE_TYPES and adds_noise and predicted_variance is None:
        raise ConfigError(f"predicted_variance: needed with variance_type {variance_type!r}")
    scale, scales = _split_scale(guidance_scale)
    seeds, position = _philox_state(sample, seed, offset)
    return _step(
        "ddpm_step",
        sample,
        model_output,
        coefficients,
        {
            "prediction_type": prediction_type,
            "clip_range": clip_range,
            "threshold": threshold,
            "variance_type": variance_type,
            "predicted_variance": predicted_variance,
            "model_output_uncond": model_output_uncond,
            "guidance_scale": scale,
            "guidance_scales": scales,
            "guidance_rescale": guidance_rescale,
            "noise": noise,
            "seed": seeds,
            "offset": position,
            "return_original": return_original,
        },
    )


def predict_original_sample(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: str = "epsilon",
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    guidance_rescale: float = 0.0,
) -> Tensor:
    """x₀ as `ddim_step` and `ddpm_step` predict it, before clipping or thresholding.

    Arguments as in `ddim_step`; `coefficients` may be those of either step.

    Returns:
        Shape of `sample`, in float32, or float64 for a float64 sample.
    """
    scale, scales = _split_scale(guidance_scale)
    given = {"model_output_uncond": model_output_uncond, "guidance_scales": scales}
    _check(
        sample, model_output, coefficients, coefficients.shape[-1],
        {"prediction_type": prediction_type, **given},
    )  # fmt: skip
    return reference.original_sample(
        sample,
        model_output,
        coefficients,
        prediction_type=prediction_type,
        model_output_uncond=model_output_uncond,
        guidance_scale=scale,
        guidance_scales=scales,
        guidance_rescale=guidance_rescale,
    )


def dynamic_threshold(original: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Dynamic thresholds of Imagen (Saharia et al., 2205.11487, section 2.3).

    Args:
        original: x₀ before any clipping, [B, …], float32 or float64.
        ratio: the quantile of |x₀| in each sample, in [0, 1].
        max_value: largest threshold; the smallest is 1.

    Returns:
        [B], dtype of `original`: the quantile of each sample, clamped to [1, max_value].
    """
    magnitude = original.flatten(1).abs()
    if magnitude.numel() > _QUANTILE_LIMIT:
        quantile = torch.stack([torch.quantile(row, ratio) for row in magnitude])
    else:
        quantile = torch.quantile(magnitude, ratio, dim=1)
    return quantile.clamp(min=1, max=max_value)


def _step(
    op_name: str,
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    options: dict[str, Any],
) -> DiffusionStepOutput:
    """Check, choose a backend and call it; `options` are the raw operator's other arguments.

    Raises:
        BackendUnavailableError: the backend asked for by name cannot serve the call.
        ConfigError: see `ddim_step`.
    """
    operands = (sample, model_output, coefficients)
    tensors = (*operands, *map(options.get, _TENSOR_OPTIONS))
    if prefers_cpp(sample) and _direct.may_call_kernel(*tensors, backend="cpp"):
        # The kernel refuses what the checks refuse. They cost more time than a small step, and are
        # to say what is wrong.
        try:
            return DiffusionStepOutput(
                *_schema.kernel(f"{op_name}_fwd", "cpp")(*operands, **options)
            )
        except (RuntimeError, TypeError):
            pass
    _check(*operands, _WIDTHS[op_name], options)
    given = [value for value in tensors if value is not None]
    backend = choose(op_name, *given)
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        is_wanted = options.pop("return_original")
        formula = reference.ddim_step if op_name == "ddim_step" else reference.ddpm_step
        previous, original = formula(*operands, **options)
        return DiffusionStepOutput(previous, original if is_wanted else sample.new_empty(0))
    return DiffusionStepOutput(
        *_direct.raw(f"{op_name}_fwd", backend, *given)(*operands, **options)
    )


def _split_scale(guidance_scale: float | Tensor) -> tuple[float, Tensor | None]:
    """A schema argument is either a number or a tensor, so the guidance scale takes two."""
    if isinstance(guidance_scale, Tensor):
        return 1.0, guidance_scale
    return float(guidance_scale), None


def _philox_state(
    sample: Tensor, seed: int | Tensor | None, offset: int | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Seed [1] or [B] and offset [] as int64 tensors on the device of `sample`."""
    if seed is None:
        return None, None
    rows = _int64("seed", seed, sample).reshape(-1)
    if rows.shape[0] != 1 and rows.shape != sample.shape[:1]:
        raise ConfigError(
            f"seed: got {rows.shape[0]} seeds; accepted: one, or one a sample of shape "
            f"{list(sample.shape)}"
        )
    position = _int64("offset", offset, sample)
    if position.ndim != 0:
        raise ConfigError(f"offset: got shape {list(position.shape)}; accepted: a scalar")
    return rows, position


def _int64(name: str, value: int | Tensor, sample: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.device != sample.device:
            raise ConfigError(
                f"{name}: got {value.dtype} on {value.device}; "
                f"accepted: torch.int64 on {sample.device}"
            )
        return value
    # The same 64 bits, read as signed.
    signed = (value + 2**63) % 2**64 - 2**63
    return torch.full((), signed, dtype=torch.int64, device=sample.device)


def _check(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    width: int,
    options: dict[str, Any],
) -> None:
    """Raise ConfigError for what the raw operators do not accept."""
    if not sample.is_floating_point() or sample.ndim == 0:
        raise ConfigError(
            f"sample: got {sample.dtype} of shape {list(sample.shape)}; "
            "accepted: a floating tensor [B, …]"
        )
    if options.get("seed") is not None and options["noise"] is not None:
        raise ConfigError("seed: give either noise or seed, not both")
    shape, device = sample.shape, sample.device
    _check_tensor("model_output", model_output, shape, shape, device)
    for name in _SHAPED_AS_SAMPLE:
        if (value := options.get(name)) is not None:
            _check_tensor(name, value, shape, shape, device)
    batch = shape[0]
    _check_tensor("coefficients", coefficients, (width,), (batch, width), device)
    if (threshold := options.get("threshold")) is not None:
        _check_tensor("threshold", threshold, (batch,), (batch,), device)
        if options["clip_range"] is not None:
            raise ConfigError("threshold: give either clip_range or threshold, not both")
    if (scales := options["guidance_scales"]) is not None:
        _check_tensor("guidance_scale", scales, (), (batch,), device)
    if (kind := options["prediction_type"]) not in PREDICTION_TYPES:
        raise ConfigError(f"prediction_type: got {kind!r}; accepted: {', '.join(PREDICTION_TYPES)}")


def _check_tensor(
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    other_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    fits = value.shape == shape or value.shape == other_shape
    if not fits or value.device != device or not value.is_floating_point():
        accepted = " or ".join(str(list(accepted)) for accepted in {shape: 0, other_shape: 0})
        raise ConfigError(
            f"{name}: got {value.dtype} of shape {list(value.shape)} on {value.device}; "
            f"accepted: a floating tensor {accepted} on {device}"
        )
