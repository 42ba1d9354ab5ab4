"""First stages, KL and VQ: an encoding and a decoding of a 128² image by narrow models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from benchmarks.contestants import LAYOUTS, PEERS, Results, contestants, diffusers_twin
from benchmarks.timing import Race
from fastldm.profiling import narrow

IMAGE_SIZE = 128
ROUNDS = 11
MODELS = [(4, "kl"), (8, "kl"), (4, "vq"), (8, "vq")]
NAMES = [f"f={f} {regularization.upper()}" for f, regularization in MODELS]


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_encode(model: tuple[int, str], peers: Sequence[str], race: Race, device: str) -> None:
    spec = narrow(*model, image_size=IMAGE_SIZE)
    first_stage = spec.build_first_stage(device)
    assert first_stage is not None
    images = spec.images(1, device)

    @torch.no_grad()
    def work(network: nn.Module) -> Results:
        found = network.encode(images)
        return (found.latent_dist.mode() if model[1] == "kl" else found.latents,)

    race(contestants(first_stage.eval(), work, peers, diffusers_twin(first_stage)), ROUNDS)


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_decode(
    model: tuple[int, str], layout: str, peers: Sequence[str], race: Race, device: str
) -> None:
    """With VQ the nearest codes are looked up first."""
    spec = narrow(*model, image_size=IMAGE_SIZE)
    first_stage = spec.build_first_stage(device)
    assert first_stage is not None
    first_stage.eval().to(memory_format=LAYOUTS[layout])
    latents = torch.randn(1, *spec.latent_shape, device=device)

    @torch.no_grad()
    def work(network: nn.Module) -> Results:
        return (network.decode(latents).sample,)

    twin = diffusers_twin(first_stage, LAYOUTS[layout])
    race(contestants(first_stage, work, peers, twin), ROUNDS)
