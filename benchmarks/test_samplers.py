"""A few steps of a sampler, network included: ours with our UNet, and diffusers' with its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastldm.schedulers
from benchmarks.contestants import PEERS, Results, contestants, diffusers_twin
from benchmarks.timing import Race
from fastldm.models import UNet2DModel
from fastldm.profiling import narrow

STEPS = 4
ROUNDS = 15
CONFIG = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {},
}


def _scheduler(library: Any, name: str) -> Any:
    scheduler = getattr(library, name)(**CONFIG, **SCHEDULERS[name])
    scheduler.set_timesteps(STEPS)
    return scheduler


def _sampled(network: nn.Module, scheduler: Any, noise: Tensor) -> Tensor:
    scheduler.set_timesteps(STEPS)
    sample = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(network(given, timestep).sample, timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_four_steps(name: str, peers: Sequence[str], race: Race, device: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    spec = narrow(8, "kl")
    unet = spec.build_unet(device).eval()
    noise = torch.randn(1, *spec.latent_shape, device=device)
    ours, theirs = _scheduler(fastldm.schedulers, name), _scheduler(diffusers, name)
    build = diffusers_twin(unet)

    @torch.no_grad()
    def work(network: nn.Module) -> Results:
        is_ours = isinstance(getattr(network, "_orig_mod", network), UNet2DModel)
        return (_sampled(network, ours if is_ours else theirs, noise),)

    race(contestants(unet, work, peers, build), ROUNDS)
