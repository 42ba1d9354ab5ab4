"""The sampling steps on a GPU: one pass over the sample, nothing in between written.

Element i of a sample has two coordinates, outer and inner, and each tensor strides of its own for
them, so that a channels_last model output meets a contiguous sample; where all tensors are dense in
one order there is but one coordinate, and 16 bytes a thread. The numbers of the elements in the
noise, which are row-major, have coordinates of their own. Scalars are read from device memory.
Every product, sum and quotient is rounded as in the reference, and the noise has its bits.

Rescaled guidance needs the standard deviations of each sample first: a launch of its own takes the
moments of pieces, and each program of the step joins them (Chan et al., 1983).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.ops._triton import LAUNCH_OPTIONS, on_device_of
from fastldm.ops.diffusion_step.coefficients import LEARNED_VARIANCE_TYPES
from fastldm.ops.diffusion_step.strides import Walk, row_major, walk
from fastldm.ops.diffusion_step.triton_noise import normal_blocks, normal_elements

BLOCK_BYTES = 2048  # of the sample, to a program: 16 for each of 128 threads
MOMENTS_BLOCK = 2048
MOST_PIECES = 64
_OPTIONS = {**LAUNCH_OPTIONS, "enable_fp_fusion": False}


@triton.jit
def _load(ptr, strides, b, outer, inner, in_sample):
    at = ptr + b * strides[0] + outer * strides[1] + inner * strides[2]
    return tl.load(at, mask=in_sample, other=0.0).to(tl.float32)


@triton.jit
def _position(i, inner_size, FLAT: tl.constexpr):
    """(outer, inner) of element i."""
    outer, inner = tl.zeros_like(i), i
    if not FLAT:
        outer, inner = i // inner_size, i % inner_size
    return outer, inner


@triton.jit
def _guide(cond, uncond, guidance_scale, guidance_scales_ptr, scales_stride, b):
    if guidance_scales_ptr is not None:
        guidance_scale = tl.load(guidance_scales_ptr + b * scales_stride).to(tl.float32)
    return uncond + guidance_scale * (cond - uncond)


@triton.jit
def _join(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Mean and sum of squared deviations of both."""
    d = mean_b - mean_a
    share = tl.div_rn(count_b, tl.maximum(count_a + count_b, 1.0))
    return mean_a + d * share, m2_a + m2_b + d * d * count_a * share


@triton.jit
def _moments(x, in_sample, count):
    mean = tl.div_rn(tl.sum(tl.where(in_sample, x, 0.0), 0), tl.maximum(count, 1.0))
    d = tl.where(in_sample, x - mean, 0.0)
    return mean, tl.sum(d * d, 0)


@triton.jit
def _diffusion_step_moments_kernel(
    cond_ptr, uncond_ptr, guidance_scales_ptr, moments_ptr, cond_strides, uncond_strides,
    scales_stride, guidance_scale, count, inner_size, span, pieces,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[mean, m2] of the conditional and of the guided output, of `span` elements of a sample."""
    piece = (tl.program_id(0) % pieces).to(tl.int64)
    b = (tl.program_id(0) // pieces).to(tl.int64)
    # About the first element, so that a mean far from zero takes no digits from the deviations.
    first_cond = tl.load(cond_ptr + b * cond_strides[0]).to(tl.float32)
    first_uncond = tl.load(uncond_ptr + b * uncond_strides[0]).to(tl.float32)
    first_guided = _guide(
        first_cond, first_uncond, guidance_scale, guidance_scales_ptr, scales_stride, b
    )
    zero = tl.zeros([], tl.float32)
    seen, mean_c, m2_c, mean_g, m2_g = zero, zero, zero, zero, zero
    for start in range(piece * span, tl.minimum(count, (piece + 1) * span), BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        in_sample = i < count
        outer, inner = _position(i, inner_size, FLAT)
        cond = _load(cond_ptr, cond_strides, b, outer, inner, in_sample)
        uncond = _load(uncond_ptr, uncond_strides, b, outer, inner, in_sample)
        guided = _guide(cond, uncond, guidance_scale, guidance_scales_ptr, scales_stride, b)
        new = tl.sum(in_sample.to(tl.float32), 0)
        new_mean_c, new_m2_c = _moments(cond - first_cond, in_sample, new)
        new_mean_g, new_m2_g = _moments(guided - first_guided, in_sample, new)
        mean_c, m2_c = _join(seen, mean_c, m2_c, new, new_mean_c, new_m2_c)
        mean_g, m2_g = _join(seen, mean_g, m2_g, new, new_mean_g, new_m2_g)
        seen += new
    at = moments_ptr + (b * pieces + piece) * 4
    tl.store(at, mean_c)
    tl.store(at + 1, m2_c)
    tl.store(at + 2, mean_g)
    tl.store(at + 3, m2_g)


@triton.jit
def _deviation(moments_ptr, b, count, span, pieces, WHICH: tl.constexpr, PIECES: tl.constexpr):
    """The standard deviation of a sample, from the moments of its pieces."""
    piece = tl.arange(0, PIECES).to(tl.int64)
    in_sample = piece < pieces
    size = tl.where(in_sample, tl.minimum(count - piece * span, span), 0).to(tl.float32)
    at = moments_ptr + (b * pieces + piece) * 4 + WHICH
    means = tl.load(at, mask=in_sample, other=0.0)
    m2 = tl.load(at + 1, mask=in_sample, other=0.0)
    total = tl.sum(size, 0)
    mean = tl.div_rn(tl.sum(means * size, 0), total)
    d = tl.where(in_sample, means - mean, 0.0)
    return tl.sqrt_rn(tl.div_rn(tl.sum(m2 + size * d * d, 0), total - 1.0))


@triton.jit
def _within(x, low, high):
    """Clamped; NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _diffusion_step_fwd_kernel(
    sample_ptr, output_ptr, uncond_ptr, noise_ptr, variance_ptr, coefficients_ptr, threshold_ptr,
    guidance_scales_ptr, moments_ptr, seed_ptr, offset_ptr, previous_ptr, original_ptr,
    sample_strides, output_strides, uncond_strides, noise_strides, variance_strides,
    result_strides, number_strides,
    row_stride, column_stride, threshold_stride, scales_stride, seed_stride,
    guidance_scale, rescale, kept, clip_range, count, inner_size, number_inner_size,
    blocks, span, pieces,
    DDPM: tl.constexpr, PREDICTION: tl.constexpr, VARIANCE: tl.constexpr,
    REDERIVED: tl.constexpr, FLAT: tl.constexpr, NUMBERS_FLAT: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    in_sample = i < count
    outer, inner = _position(i, inner_size, FLAT)
    x = _load(sample_ptr, sample_strides, b, outer, inner, in_sample)
    output = _load(output_ptr, output_strides, b, outer, inner, in_sample)
    if uncond_ptr is not None:
        uncond = _load(uncond_ptr, uncond_strides, b, outer, inner, in_sample)
        guided = _guide(output, uncond, guidance_scale, guidance_scales_ptr, scales_stride, b)
        if moments_ptr is not None:
            ratio = tl.div_rn(
                _deviation(moments_ptr, b, count, span, pieces, 0, PIECES),
                _deviation(moments_ptr, b, count, span, pieces, 2, PIECES),
            )
            guided = rescale * (guided * ratio) + kept * guided
        output = guided

    coefficients_ptr += b * row_stride
    sqrt_alpha = tl.load(coefficients_ptr).to(tl.float32)
    sqrt_beta = tl.load(coefficients_ptr + column_stride).to(tl.float32)
    if PREDICTION == "epsilon":
        original = tl.div_rn(x - sqrt_beta * output, sqrt_alpha)
    elif PREDICTION == "v_prediction":
        original = sqrt_alpha * x - sqrt_beta * output
    else:
        original = output
    limited = original
    if threshold_ptr is not None:
        bound = tl.load(threshold_ptr + b * threshold_stride).to(tl.float32)
        limited = tl.div_rn(_within(original, -bound, bound), bound)
    elif clip_range is not None:
        limited = _within(original, -clip_range, clip_range)

    if DDPM:
        direction = x
    elif REDERIVED:
        direction = tl.div_rn(x - sqrt_alpha * limited, sqrt_beta)
    elif PREDICTION == "epsilon":
        direction = output
    elif PREDICTION == "v_prediction":
        direction = sqrt_alpha * output + sqrt_beta * x
    else:
        direction = tl.div_rn(x - sqrt_alpha * original, sqrt_beta)
    to_original = tl.load(coefficients_ptr + 2 * column_stride).to(tl.float32)
    to_direction = tl.load(coefficients_ptr + 3 * column_stride).to(tl.float32)
    previous = to_original * limited + to_direction * direction

    if noise_ptr is not None or seed_ptr is not None:
        sigma = tl.load(coefficients_ptr + 4 * column_stride).to(tl.float32)
        if variance_ptr is not None:
            variance = _load(variance_ptr, variance_strides, b, outer, inner, in_sample)
            if VARIANCE == "learned":
                sigma = sigma * tl.sqrt_rn(variance)
            else:
                log_min = tl.load(coefficients_ptr + 5 * column_stride).to(tl.float32)
                log_max = tl.load(coefficients_ptr + 6 * column_stride).to(tl.float32)
                fraction = (variance + 1.0) * 0.5
                sigma *= tl.exp(0.5 * (fraction * log_max + (1.0 - fraction) * log_min))
        if noise_ptr is not None:
            noise = _load(noise_ptr, noise_strides, b, outer, inner, in_sample)
        else:
            seed = tl.load(seed_ptr + b * seed_stride)
            offset = tl.load(offset_ptr)
            # One seed counts through the whole tensor, a seed a sample through that sample.
            start = b * number_strides[0]
            if WHOLE_BLOCKS:
                block = (start + first) // 4 + tl.arange(0, BLOCK // 4)
                noise = normal_blocks(block, seed, offset)
            else:
                row, column = _position(i, number_inner_size, NUMBERS_FLAT)
                index = start + row * number_strides[1] + column * number_strides[2]
                noise = normal_elements(index, seed, offset)
        previous = previous + sigma * noise

    at = b * result_strides[0] + outer * result_strides[1] + inner * result_strides[2]
    tl.store(previous_ptr + at, previous.to(previous_ptr.dtype.element_ty), mask=in_sample)
    if original_ptr is not None:
        tl.store(original_ptr + at, limited.to(original_ptr.dtype.element_ty), mask=in_sample)


def ddim_step_fwd(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    use_clipped_model_output: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`reference.ddim_step` in the layout of `sample`."""
    return _step(
        sample, model_output, coefficients, False, use_clipped_model_output, "", None, **options
    )


def ddpm_step_fwd(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    variance_type: str,
    predicted_variance: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`reference.ddpm_step` in the layout of `sample`."""
    if variance_type not in LEARNED_VARIANCE_TYPES:
        predicted_variance = None
    return _step(
        sample, model_output, coefficients, True, False, variance_type, predicted_variance,
        **options,
    )  # fmt: skip


def _step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    is_ddpm: bool,
    rederived: bool,
    variance_type: str,
    predicted_variance: Tensor | None,
    *,
    prediction_type: str,
    clip_range: float | None,
    threshold: Tensor | None,
    model_output_uncond: Tensor | None,
    guidance_scale: float,
    guidance_scales: Tensor | None,
    guidance_rescale: float,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    return_original: bool,
) -> tuple[Tensor, Tensor]:
    previous = torch.empty_like(sample)
    original = torch.empty_like(sample) if return_original else sample.new_empty(0)
    if not sample.numel():
        return previous, original
    inputs: tuple[Tensor | None, ...] = (
        sample, model_output, model_output_uncond, noise, predicted_variance,
    )  # fmt: skip
    results = (previous, original)
    images, numbers = _walk(previous, inputs), _walk_numbers(previous, seed)
    if images is None or numbers is None:
        inputs = tuple(None if t is None else t.contiguous() for t in inputs)
        results = (previous.new_empty(previous.shape), original.new_empty(original.shape))
        images, numbers = _walk(results[0], inputs), _walk_numbers(results[0], seed)
        assert images is not None
        assert numbers is not None
    batch, count = sample.shape[0], math.prod(sample.shape[1:])
    scales_stride = _per_sample_stride(guidance_scales)
    with on_device_of(sample):
        moments, span, pieces = None, 0, 1
        if model_output_uncond is not None and guidance_rescale:
            span, pieces = pieces_of(count)
            moments = sample.new_empty((batch, pieces, 4), dtype=torch.float32)
            _diffusion_step_moments_kernel[(batch * pieces,)](
                inputs[1], inputs[2], guidance_scales, moments, *images.strides[1:3], scales_stride,
                guidance_scale, count, images.inner_size, span, pieces,
                FLAT=images.is_flat, BLOCK=MOMENTS_BLOCK, **_OPTIONS,
            )  # fmt: skip
        block = BLOCK_BYTES // sample.itemsize
        blocks = -(-count // block)
        whole_blocks = numbers.is_flat and numbers.strides[0][0] % 4 == 0
        _diffusion_step_fwd_kernel[(batch * blocks,)](
            *inputs, coefficients, threshold, guidance_scales, moments, seed, offset,
            results[0], results[1] if return_original else None,
            *images.strides, *numbers.strides,
            coefficients.stride(0) if coefficients.ndim == 2 else 0, coefficients.stride(-1),
            _per_sample_stride(threshold), scales_stride, _per_sample_stride(seed),
            guidance_scale, guidance_rescale, 1 - guidance_rescale, clip_range,
            count, images.inner_size, numbers.inner_size, blocks, span, pieces,
            DDPM=is_ddpm, PREDICTION=prediction_type, VARIANCE=variance_type, REDERIVED=rederived,
            FLAT=images.is_flat, NUMBERS_FLAT=numbers.is_flat, WHOLE_BLOCKS=whole_blocks,
            PIECES=triton.next_power_of_2(pieces),
            BLOCK=block, **_OPTIONS,
        )  # fmt: skip
    if results[0] is not previous:
        previous.copy_(results[0])
        original.copy_(results[1])
    return previous, original


def pieces_of(count: int) -> tuple[int, int]:
    """In pieces of how many elements the moments of a sample are taken, and how many pieces."""
    span = MOMENTS_BLOCK * -(-count // (MOMENTS_BLOCK * MOST_PIECES))
    return span, -(-count // span)


def _walk(result: Tensor, inputs: Sequence[Tensor | None]) -> Walk | None:
    """A walk over the inputs and the result."""
    absent = (0,) * result.ndim
    strides = (absent if t is None else t.stride() for t in inputs)
    return walk(result, (*strides, result.stride()))


def _walk_numbers(result: Tensor, seed: Tensor | None) -> Walk | None:
    """A walk over the numbers that the elements of the result have in the noise."""
    numbers = (0,) * result.ndim
    if seed is not None:
        numbers = row_major(result.shape)
        if seed.shape[0] > 1:
            numbers = (0, *numbers[1:])
    return walk(result, (numbers,))


def _per_sample_stride(values: Tensor | None) -> int:
    """Of [B]; 0 where there is one value for all samples."""
    return 0 if values is None or values.numel() == 1 else values.stride(0)
