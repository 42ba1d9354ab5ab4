"""The specification of the sampling steps, in plain torch.

Half precisions are computed in float32, float64 in float64. Every function is differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

PhiloxWords = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: PhiloxWords, key: tuple[Tensor, Tensor]) -> PhiloxWords:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors of words in [0, 2³²), broadcastable against each other.
        key: two such tensors.

    Returns:
        Four int64 tensors of random words in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        # An int64 product wraps modulo 2⁶⁴, so its bits are those of the unsigned product.
        product_0 = c0 * _PHILOX_MULTIPLIERS[0]
        product_1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product_1 >> 32 & _MASK_32) ^ c1 ^ k0,
            product_1 & _MASK_32,
            (product_0 >> 32 & _MASK_32) ^ c3 ^ k1,
            product_0 & _MASK_32,
        )
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK_32
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _MASK_32
    return c0, c1, c2, c3


def philox_normal(shape: torch.Size, dtype: torch.dtype, seed: Tensor, offset: Tensor) -> Tensor:
    """Standard normal noise that depends on nothing but seed, offset and position.

    Element `i`, in row-major order of the shape whatever the memory layout, is lane ``i % 4`` of
    the block with counter ``(i // 4, offset)`` and key ``seed``, each 64-bit value given as low
    word, high word. With one seed, `i` counts through the whole tensor; with one seed a sample it
    counts through that sample, so a sample's noise does not depend on its place in the batch.

    Of the block's words w₀…w₃ each pair (a, b) gives two lanes by Box and Muller's transform:
    ``√(−2 ln u) cos(2π v)`` and ``√(−2 ln u) sin(2π v)`` with ``u = (⌊a/2⌋ + 1)·2⁻³¹`` rounded to
    float32 and ``v = ⌊b/256⌋·2⁻²⁴``. The transform is in float32 for every dtype, and made of
    sums, products, quotients and square roots, each rounded: any backend that takes them one by
    one draws the same bits, which no two libraries' ln and cos do.

    Args:
        shape: [B, …].
        dtype: of the result.
        seed: int64, [1] or [B]; its 64 bits are read as unsigned.
        offset: int64, 0-dimensional.

    Returns:
        Noise of `shape` and `dtype`, contiguous.
    """
    rows = seed.shape[0]
    count = math.prod(shape) if rows == 1 else math.prod(shape[1:])
    block = torch.arange((count + 3) // 4, device=seed.device).unsqueeze(0)
    normal = normal_of_blocks(block, seed.unsqueeze(1), offset)[:, :count]
    return normal.reshape(shape).to(dtype)


def normal_of_blocks(block: Tensor, key: Tensor, offset: Tensor) -> Tensor:
    """The four normal numbers of each Philox block of `philox_normal`, in float32.

    Args:
        block: int64, [1, N].
        key: int64, [B, 1].
        offset: int64, 0-dimensional.

    Returns:
        [B, 4·N].
    """
    words = philox_4x32(
        (block & _MASK_32, block >> 32, offset & _MASK_32, offset >> 32 & _MASK_32),
        (key & _MASK_32, key >> 32 & _MASK_32),
    )
    lanes: list[Tensor] = []
    for a, b in (words[:2], words[2:]):
        u = ((a >> 1).to(torch.float32) + 1) * 2.0**-31
        # By way of float64, because not every library rounds a float32 root correctly.
        radius = (-2 * _logarithm(u)).double().sqrt().float()
        cosine, sine = _turn(b >> 8)
        lanes += [radius * cosine, radius * sine]
    return torch.stack(lanes, dim=-1).flatten(1)


def _logarithm(u: Tensor) -> Tensor:
    """ln u = e ln 2 + 2 artanh((m − 1)/(m + 1)) where u = m·2ᵉ and √½ ≤ m < √2."""
    mantissa, exponent = torch.frexp(u)
    is_small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(is_small, 2 * mantissa, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(s * s, [1 / (2 * k + 1) for k in range(5)])
    return (exponent - is_small.to(exponent.dtype)).to(u.dtype) * math.log(2) + 2 * s * series


def _turn(position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle ``2π·position·2⁻²⁴``, from the nearest quarter turn."""
    quarter = (position + 2**21) >> 22
    t = (position - (quarter << 22)).to(torch.float32) * (2 * math.pi * 2.0**-24)
    cosine = _polynomial(t * t, [(-1) ** k / math.factorial(2 * k) for k in range(6)])
    sine = t * _polynomial(t * t, [(-1) ** k / math.factorial(2 * k + 1) for k in range(6)])
    is_odd = (quarter & 1).bool()
    along, across = torch.where(is_odd, sine, cosine), torch.where(is_odd, cosine, sine)
    return (
        torch.where(((quarter + 1) & 2).bool(), -along, along),
        torch.where((quarter & 2).bool(), -across, across),
    )


def _polynomial(z: Tensor, coefficients: list[float]) -> Tensor:
    """By Horner's rule, the constant first."""
    total = torch.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * z + coefficient
    return total


def guide(
    model_output: Tensor,
    model_output_uncond: Tensor,
    guidance_scale: float | Tensor,
    guidance_rescale: float,
) -> Tensor:
    """Classifier-free guidance (2207.12598, eq. 6, scale = 1 + w), rescaled as in 2305.08891, 3.4.

    Args:
        model_output: the conditional prediction [B, …].
        model_output_uncond: the unconditional prediction [B, …].
        guidance_scale: a number, or a tensor that broadcasts against the predictions.
        guidance_rescale: φ; 0 leaves the guided prediction as it is, 1 gives it the standard
            deviation of the conditional one, sample by sample.
    """
    guided = model_output_uncond + guidance_scale * (model_output - model_output_uncond)
    if guidance_rescale == 0:
        return guided
    dims = list(range(1, guided.ndim))
    ratio = model_output.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guidance_rescale * (guided * ratio) + (1 - guidance_rescale) * guided


def predict_original(
    sample: Tensor,
    model_output: Tensor,
    sqrt_alpha: Tensor,
    sqrt_beta: Tensor,
    prediction_type: str,
) -> Tensor:
    """x₀ from the model's output: DDPM eq. 15 for ε, 2202.00512 for v."""
    if prediction_type == "epsilon":
        return (sample - sqrt_beta * model_output) / sqrt_alpha
    if prediction_type == "v_prediction":
        return sqrt_alpha * sample - sqrt_beta * model_output
    return model_output


def limit(original: Tensor, clip_range: float | None, threshold: Tensor | None) -> Tensor:
    """Clip x₀ to ±clip_range, or to ±threshold of its sample and divide by it (2205.11487, 2.3)."""
    if threshold is not None:
        bound = _per_sample(threshold.to(original.dtype), original.ndim)
        return original.clamp(-bound, bound) / bound
    if clip_range is not None:
        return original.clamp(-clip_range, clip_range)
    return original


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: str,
    clip_range: float | None,
    threshold: Tensor | None,
    use_clipped_model_output: bool,
    model_output_uncond: Tensor | None,
    guidance_scale: float,
    guidance_scales: Tensor | None,
    guidance_rescale: float,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One DDIM step, 2010.02502 eq. 12; the arguments are those of `fastldm.ops.ddim_step`."""
    x, output = _operands(
        sample, model_output, model_output_uncond, guidance_scale, guidance_scales, guidance_rescale
    )
    noise = _noise(x, noise, seed, offset)
    sqrt_alpha, sqrt_beta, sqrt_alpha_prev, direction, sigma = _scalars(coefficients, x)
    original = predict_original(x, output, sqrt_alpha, sqrt_beta, prediction_type)
    limited = limit(original, clip_range, threshold)
    if use_clipped_model_output:
        epsilon = (x - sqrt_alpha * limited) / sqrt_beta
    elif prediction_type == "epsilon":
        epsilon = output
    elif prediction_type == "v_prediction":
        epsilon = sqrt_alpha * output + sqrt_beta * x
    else:
        epsilon = (x - sqrt_alpha * original) / sqrt_beta
    previous = sqrt_alpha_prev * limited + direction * epsilon
    if noise is not None:
        previous = previous + sigma * noise
    return previous.to(sample.dtype), limited.to(sample.dtype)


def ddpm_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: str,
    clip_range: float | None,
    threshold: Tensor | None,
    variance_type: str,
    predicted_variance: Tensor | None,
    model_output_uncond: Tensor | None,
    guidance_scale: float,
    guidance_scales: Tensor | None,
    guidance_rescale: float,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One DDPM step, 2006.11239 eq. 7; the arguments are those of `fastldm.ops.ddpm_step`."""
    x, output = _operands(
        sample, model_output, model_output_uncond, guidance_scale, guidance_scales, guidance_rescale
    )
    noise = _noise(x, noise, seed, offset)
    sqrt_alpha, sqrt_beta, original_factor, sample_factor, sigma, log_min, log_max = _scalars(
        coefficients, x
    )
    original = predict_original(x, output, sqrt_alpha, sqrt_beta, prediction_type)
    original = limit(original, clip_range, threshold)
    previous = original_factor * original + sample_factor * x
    if noise is not None:
        if predicted_variance is not None and variance_type == "learned":
            sigma = sigma * predicted_variance.to(x.dtype).sqrt()
        elif predicted_variance is not None and variance_type == "learned_range":
            fraction = (predicted_variance.to(x.dtype) + 1) / 2
            sigma = sigma * (0.5 * (fraction * log_max + (1 - fraction) * log_min)).exp()
        previous = previous + sigma * noise
    return previous.to(sample.dtype), original.to(sample.dtype)


def ddim_step_fwd(
    sample: Tensor, *operands: Tensor, return_original: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ddim_step` as a raw operator."""
    return _own_memory(sample, ddim_step(sample, *operands, **options), return_original)


def ddpm_step_fwd(
    sample: Tensor, *operands: Tensor, return_original: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ddpm_step` as a raw operator."""
    return _own_memory(sample, ddpm_step(sample, *operands, **options), return_original)


def _own_memory(
    sample: Tensor, results: tuple[Tensor, Tensor], return_original: bool
) -> tuple[Tensor, Tensor]:
    """In the layout of `sample`; the original is [0] where it is not wanted."""
    previous, original = results
    return (
        torch.empty_like(sample).copy_(previous),
        torch.empty_like(sample).copy_(original) if return_original else sample.new_empty(0),
    )


def original_sample(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: str,
    model_output_uncond: Tensor | None,
    guidance_scale: float,
    guidance_scales: Tensor | None,
    guidance_rescale: float,
) -> Tensor:
    """x₀ before it is limited, in the precision of the computation."""
    x, output = _operands(
        sample, model_output, model_output_uncond, guidance_scale, guidance_scales, guidance_rescale
    )
    sqrt_alpha, sqrt_beta, *_ = _scalars(coefficients, x)
    return predict_original(x, output, sqrt_alpha, sqrt_beta, prediction_type)


def _operands(
    sample: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    guidance_scale: float,
    guidance_scales: Tensor | None,
    guidance_rescale: float,
) -> tuple[Tensor, Tensor]:
    """Sample and guided model output, in the precision of the computation."""
    x = sample.to(torch.float64 if sample.dtype == torch.float64 else torch.float32)
    output = model_output.to(x.dtype)
    if model_output_uncond is not None:
        scale: float | Tensor = guidance_scale
        if guidance_scales is not None:
            scale = _per_sample(guidance_scales.to(x.dtype), x.ndim)
        output = guide(output, model_output_uncond.to(x.dtype), scale, guidance_rescale)
    return x, output


def _noise(
    like: Tensor, noise: Tensor | None, seed: Tensor | None, offset: Tensor | None
) -> Tensor | None:
    """The given noise, or that of seed and offset, or none; in the dtype of `like`."""
    if noise is not None:
        return noise.to(like.dtype)
    if seed is not None and offset is not None:
        return philox_normal(like.shape, like.dtype, seed, offset)
    return None


def _scalars(coefficients: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of `coefficients` ([K] or [B, K]), each broadcastable against `like`."""
    columns = coefficients.to(like.dtype).unbind(-1)
    return tuple(_per_sample(column, like.ndim) for column in columns)


def _per_sample(value: Tensor, ndim: int) -> Tensor:
    """View [B] as [B, 1, …] with `ndim` dimensions; a 0-dimensional value stays as it is."""
    return value if value.ndim == 0 else value.reshape(-1, *(1,) * (ndim - 1))
