"""What the latent space saves: diffusion at f = 4 against f = 1 on images of the same size.

Both UNets are of the paper's shape (Table 14) with 32 channels in the first level. A sampling
step is the UNet and DDIM's update; of an image that is sampled, the decoding comes once on top. The
ratio is that of f = 1 to f = 4, in each of five runs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Race
from fastldm import ops
from fastldm.profiling import LDMSpec, narrow

RUNS, ROUNDS = 5, 3
IMAGE_SIZES = [128, pytest.param(256, marks=pytest.mark.slow)]


def _specs(image_size: int) -> dict[str, LDMSpec]:
    return {
        "f=4": narrow(4, "vq", image_size=image_size),
        "f=1": narrow(1, "none", image_size=image_size),
    }


def _sampling_step(spec: LDMSpec, device: str) -> Callable[[], Tensor]:
    unet = spec.build_unet(device).eval()
    z, timesteps = spec.unet_inputs(1, device)
    row = ops.ddim_coefficients(torch.tensor(0.4), torch.tensor(0.7)).to(device)

    @torch.no_grad()
    def call() -> Tensor:
        return ops.ddim_step(z, unet(z, timesteps).sample, row).prev_sample

    return call


def _training_step(spec: LDMSpec, device: str) -> Callable[[], Tensor]:
    unet = spec.build_unet(device)
    z, timesteps = spec.unet_inputs(1, device)
    optimizer = torch.optim.AdamW(unet.parameters())

    def call() -> Tensor:
        loss = F.mse_loss(unet(z, timesteps).sample, z)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return call


def _assert_finite(calls: dict[str, Callable[[], Tensor]]) -> None:
    for name, call in calls.items():
        assert call().isfinite().all(), name


@pytest.mark.parametrize("image_size", IMAGE_SIZES, ids="{0} pixels".format)
def test_sampling_step(image_size: int, race: Race, device: str) -> None:
    calls = {name: _sampling_step(spec, device) for name, spec in _specs(image_size).items()}
    _assert_finite(calls)
    race(calls, ROUNDS, RUNS)


@pytest.mark.parametrize("image_size", IMAGE_SIZES, ids="{0} pixels".format)
def test_training_step(image_size: int, race: Race, device: str) -> None:
    """From a latent cache: the encoding is done once for all epochs."""
    calls = {name: _training_step(spec, device) for name, spec in _specs(image_size).items()}
    _assert_finite(calls)
    race(calls, ROUNDS, RUNS)


@pytest.mark.parametrize("image_size", IMAGE_SIZES, ids="{0} pixels".format)
def test_decoding(image_size: int, race: Race, device: str) -> None:
    """What a latent costs beside its steps, and a step of each f for comparison."""
    specs = _specs(image_size)
    first_stage = specs["f=4"].build_first_stage(device)
    assert first_stage is not None
    first_stage.eval()
    z = specs["f=4"].unet_inputs(1, device)[0]

    @torch.no_grad()
    def decode() -> Tensor:
        image: Tensor = first_stage.decode(z).sample
        return image

    calls = {"f=4, decoding": decode}
    calls |= {f"{name}, a step": _sampling_step(spec, device) for name, spec in specs.items()}
    _assert_finite(calls)
    race(calls, ROUNDS)
