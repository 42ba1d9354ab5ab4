"""The C++ backend of the sampling steps; its code is in csrc/diffusion_step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastldm.ops._extension import extension


def ddim_step_fwd(*operands: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As the reference's: the same operations in the same order, in one pass."""
    return _step("ddim", operands, options)


def ddpm_step_fwd(*operands: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As the reference's: the same operations in the same order, in one pass."""
    return _step("ddpm", operands, options)


def _step(
    sampler: str, operands: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The operands are sample, model output and coefficients."""
    result: tuple[Tensor, Tensor] = extension().diffusion_step_fwd(
        sampler, *operands, options["prediction_type"], options["clip_range"],
        options["threshold"], options.get("use_clipped_model_output", False),
        options.get("variance_type", "fixed_small"), options.get("predicted_variance"),
        options["model_output_uncond"], options["guidance_scale"], options["guidance_scales"],
        options["guidance_rescale"], options["noise"], options["seed"], options["offset"],
        options["return_original"],
    )  # fmt: skip
    return result
