"""The C++ backend of the sampling steps; its code is in csrc/diffusion_step."""

from __future__ import annotations

from torch import Tensor

from fastldm.ops._extension import extension


def ddim_step_fwd(
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
    return_original: bool,
) -> tuple[Tensor, Tensor]:
    """As the reference's: the same operations in the same order, in one pass."""
    result: tuple[Tensor, Tensor] = extension().diffusion_step_fwd(
        "ddim", sample, model_output, coefficients, prediction_type, clip_range, threshold,
        use_clipped_model_output, "fixed_small", None, model_output_uncond, guidance_scale,
        guidance_scales, guidance_rescale, noise, seed, offset, return_original,
    )  # fmt: skip
    return result


def ddpm_step_fwd(
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
    return_original: bool,
) -> tuple[Tensor, Tensor]:
    """As the reference's: the same operations in the same order, in one pass."""
    result: tuple[Tensor, Tensor] = extension().diffusion_step_fwd(
        "ddpm", sample, model_output, coefficients, prediction_type, clip_range, threshold, False,
        variance_type, predicted_variance, model_output_uncond, guidance_scale, guidance_scales,
        guidance_rescale, noise, seed, offset, return_original,
    )  # fmt: skip
    return result
