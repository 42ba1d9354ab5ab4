"""A guided DDIM step on the CPU against diffusers, torch.compile and copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Race
from fastldm import ops
from fastldm.schedulers import DDIMScheduler

SHAPES = [(8, 4, 64, 64), (1, 16, 128, 128)]
SCALE = 7.5
STEPS = 50
CONFIG = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
_IMAGES_MOVED = 5
"""The sample and two model outputs are read, the next sample and x₀ are written."""
_ACTIVATIONS = 2**24
_RUNS = 5
"""For the spread of the ratios: a step takes microseconds, most of them Python's."""


def _formula(x: Tensor, c: Tensor, u: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    root_alpha, root_beta, root_alpha_prev, direction, _ = row.unbind()
    epsilon = u + SCALE * (c - u)
    original = (x - root_beta * epsilon) / root_alpha
    return root_alpha_prev * original + direction * epsilon, original


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_guided_ddim_step(shape: tuple[int, ...], race: Race) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs, ours = diffusers.DDIMScheduler(**CONFIG), DDIMScheduler(**CONFIG)
    theirs.set_timesteps(STEPS)
    ours.set_timesteps(STEPS)
    timestep = ours.timesteps[20]
    alpha = theirs.alphas_cumprod[timestep]
    alpha_prev = theirs.alphas_cumprod[timestep - 1000 // STEPS]
    row = ops.ddim_coefficients(alpha, alpha_prev)
    sample, conditional, unconditional = (torch.randn(shape) for _ in range(3))
    operands = (sample, conditional, unconditional, row)

    def by_functional() -> tuple[Tensor, ...]:
        return ops.ddim_step(
            sample, conditional, row, model_output_uncond=unconditional, guidance_scale=SCALE
        )

    def by_scheduler() -> tuple[Tensor, ...]:
        return ours.step(
            conditional, timestep, sample, return_dict=False, model_output_uncond=unconditional,
            guidance_scale=SCALE,
        )  # fmt: skip

    def for_sampler() -> Tensor:
        return ours.step(
            conditional, timestep, sample, model_output_uncond=unconditional,
            guidance_scale=SCALE, return_original=False,
        ).prev_sample  # fmt: skip

    def by_diffusers() -> tuple[Tensor, ...]:
        guided = unconditional + SCALE * (conditional - unconditional)
        found = theirs.step(guided, timestep, sample)
        return found.prev_sample, found.pred_original_sample

    torch._dynamo.reset()
    compiled = torch.compile(_formula)
    # What a model's activations do to malloc: later results are not given back after each step.
    torch.empty(_ACTIVATIONS)
    # A copy reads and writes, so it moves as many bytes with half as many elements.
    as_many_bytes = torch.randn(_IMAGES_MOVED * math.prod(shape) // 2)
    with torch.no_grad():
        expected = by_diffusers()
        for found in (by_functional(), by_scheduler(), compiled(*operands)):
            for actual, want in zip(found, expected, strict=True):
                torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(for_sampler(), expected[0], rtol=1e-5, atol=1e-5)
        race(
            {
                "fastldm, functional": by_functional,
                "fastldm, scheduler": by_scheduler,
                "fastldm, next sample alone": for_sampler,
                "diffusers": by_diffusers,
                "torch.compile": lambda: compiled(*operands),
                "copy of the sample": sample.clone,
                "copy of as many bytes": as_many_bytes.clone,
            },
            runs=_RUNS,
        )
