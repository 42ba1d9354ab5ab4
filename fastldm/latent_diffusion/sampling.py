"""The sampling loop: any scheduler, guidance in one UNet call, and a seed an image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import ConfigError, DataError
from fastldm.latent_diffusion.conditioning import Conditioning

Predictor = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(z_t [B, C, h, w], t, conditioning) → the UNet's prediction [B, C, h, w]."""

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called after each step with (step_index, timestep, latents)."""


@dataclass(frozen=True)
class SamplerOptions:
    """How `run_sampler` goes through the time steps.

    Attributes:
        num_inference_steps: number of time steps.
        guidance_scale: s in u + s·(c − u) (2207.12598, eq. 6 with s = 1 + w).
        guidance_rescale: φ of 2305.08891, section 3.4.
        eta: η of DDIM (2010.02502, eq. 16), for schedulers that have it.
        callback: called after each step.
        progress: show a progress bar.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    eta: float = 0.0
    callback: StepCallback | None = None
    progress: bool = False


def make_generators(seeds: int | Sequence[int] | None, count: int) -> list[torch.Generator]:
    """One CPU generator an image, so that its noise depends on nothing but its seed.

    Args:
        seeds: one an image; or an int, for `seeds`, `seeds` + 1, …; or None, for seeds that
            torch's global generator draws.
        count: number of images.

    Raises:
        DataError: another number of seeds than images.
    """
    if seeds is None:
        chosen = torch.randint(2**63 - 1, (count,)).tolist()
    elif isinstance(seeds, int):
        chosen = list(range(seeds, seeds + count))
    else:
        chosen = [int(seed) for seed in seeds]
    if len(chosen) != count:
        raise DataError(f"seeds: got {len(chosen)} for {count} images")
    return [torch.Generator().manual_seed(seed) for seed in chosen]


def check_sampler(scheduler: Any, prediction_type: str) -> None:
    """Require that a sampler reads the UNet's output as what the UNet was trained to predict.

    Raises:
        ConfigError: it does not; both prediction types are named.
    """
    got = scheduler.config.prediction_type
    if got != prediction_type:
        raise ConfigError(
            f"scheduler: its prediction_type is {got!r}, but the model predicts {prediction_type!r}"
        )


def run_sampler(
    predict: Predictor,
    scheduler: Any,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    conditional: Conditioning,
    unconditional: Conditioning | None,
    options: SamplerOptions,
) -> Tensor:
    """Go from noise to latents.

    Args:
        predict: the UNet.
        scheduler: one of fastldm's, or an object with diffusers' ``set_timesteps``,
            ``timesteps``, ``scale_model_input`` and ``step``.
        noise: standard normal, [B, C, h, w].
        generators: of the noise inside the steps, one a sample.
        conditional: the condition of each sample.
        unconditional: for guidance: the UNet then sees both halves as one batch of 2·B.
        options: see there.

    Returns:
        z₀, [B, C, h, w].
    """
    scheduler.set_timesteps(options.num_inference_steps, device=noise.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    step = _make_step(scheduler, generators, options)
    guided = unconditional is not None
    conditioning = conditional.followed_by(unconditional) if unconditional else conditional
    z = noise * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps
    for index, timestep in enumerate(_with_progress(timesteps, options.progress)):
        model_input = scheduler.scale_model_input(z, timestep)
        if guided:
            both = predict(torch.cat([model_input, model_input]), timestep, conditioning)
            output, output_uncond = both.to(z.dtype).chunk(2)
        else:
            output = predict(model_input, timestep, conditioning).to(z.dtype)
            output_uncond = None
        z = step(output, output_uncond, timestep, z)
        if options.callback is not None:
            options.callback(index, timestep, z)
    return z


def _make_step(
    scheduler: Any, generators: Sequence[torch.Generator], options: SamplerOptions
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """`scheduler.step` with those options that it has; guidance is folded in where it can be."""
    accepted = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {}
    if "eta" in accepted:
        arguments["eta"] = options.eta
    elif options.eta:
        raise ConfigError(f"eta: got {options.eta}, but {type(scheduler).__name__} has none")
    if "generator" in accepted:
        arguments["generator"] = list(generators)
    if "return_original" in accepted:
        arguments["return_original"] = False
    folded = "model_output_uncond" in accepted

    def step(output: Tensor, output_uncond: Tensor | None, timestep: Tensor, z: Tensor) -> Tensor:
        guidance: dict[str, Any] = {}
        if output_uncond is not None and folded:
            guidance = {
                "model_output_uncond": output_uncond,
                "guidance_scale": options.guidance_scale,
                "guidance_rescale": options.guidance_rescale,
            }
        elif output_uncond is not None:
            output = guide(output, output_uncond, options.guidance_scale, options.guidance_rescale)
        return scheduler.step(output, timestep, z, **arguments, **guidance).prev_sample

    return step


def guide(output: Tensor, output_uncond: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance, for schedulers whose step does not do it.

    Args:
        output, output_uncond: predictions with and without the condition, [B, …].
        scale, rescale: as in `SamplerOptions`.

    Returns:
        [B, …].
    """
    guided = output_uncond + scale * (output - output_uncond)
    if rescale == 0:
        return guided
    dims = list(range(1, guided.ndim))
    ratio = output.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (rescale * ratio + 1 - rescale)


def _with_progress(timesteps: Tensor, progress: bool) -> Any:
    if not progress:
        return timesteps
    from tqdm.auto import tqdm

    return tqdm(timesteps, desc="Sampling", unit="step")
