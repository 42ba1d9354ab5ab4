"""A guided DDIM step on the CPU against diffusers, torch.compile and a copy of the sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Race
from fastldm import ops

SHAPES = [(8, 4, 64, 64), (1, 16, 128, 128)]
SCALE = 7.5
STEPS = 50


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_guided_ddim_step(shape: tuple[int, ...], race: Race) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    timestep = int(scheduler.timesteps[20])
    alpha = scheduler.alphas_cumprod[timestep]
    alpha_prev = scheduler.alphas_cumprod[timestep - 1000 // STEPS]
    coefficients = ops.ddim_coefficients(alpha, alpha_prev)
    sample, conditional, unconditional = (torch.randn(shape) for _ in range(3))

    def fused() -> Tensor:
        return ops.ddim_step(
            sample, conditional, coefficients, model_output_uncond=unconditional,
            guidance_scale=SCALE,
        ).prev_sample  # fmt: skip

    def by_diffusers() -> Tensor:
        guided = unconditional + SCALE * (conditional - unconditional)
        previous: Tensor = scheduler.step(guided, timestep, sample).prev_sample
        return previous

    def formula(x: Tensor, c: Tensor, u: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        root_alpha, root_beta, root_alpha_prev, direction, _ = row.unbind()
        epsilon = u + SCALE * (c - u)
        original = (x - root_beta * epsilon) / root_alpha
        return root_alpha_prev * original + direction * epsilon, original

    torch._dynamo.reset()
    compiled = torch.compile(formula)
    with torch.no_grad():
        expected = by_diffusers()
        torch.testing.assert_close(fused(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            compiled(sample, conditional, unconditional, coefficients)[0], expected, rtol=1e-5,
            atol=1e-5,
        )  # fmt: skip
        race(
            {
                "fastldm": fused,
                "copy": sample.clone,
                "diffusers": by_diffusers,
                "torch.compile": lambda: compiled(sample, conditional, unconditional, coefficients),
            }
        )
