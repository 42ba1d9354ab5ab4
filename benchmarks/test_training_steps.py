"""Training steps of both stages, from a batch to updated weights, by narrow models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import LAYOUTS, PEERS, Results, contestants, diffusers_twin
from benchmarks.timing import Race
from fastldm.profiling import narrow

BATCH = 2
ROUNDS = 15
_LEARNING_RATE = 1e-7
"""So small that losses of later calls can be held against the first one's."""


class _Training:
    """Forward, backward and AdamW's update of whatever network it is given."""

    def __init__(self, loss: Callable[[nn.Module], Tensor]) -> None:
        self._loss = loss
        self._optimizers: dict[int, torch.optim.Optimizer] = {}

    def __call__(self, network: nn.Module) -> Results:
        """The loss, and the gradients' norm."""
        optimizer = self._optimizers.get(id(network))
        if optimizer is None:
            optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
            self._optimizers[id(network)] = optimizer
        loss = self._loss(network)
        loss.backward()
        norm = nn.utils.get_total_norm(
            [weight.grad for weight in network.parameters() if weight.grad is not None]
        )
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f", [4, 8], ids="f={}".format)
def test_diffusion(f: int, layout: str, peers: Sequence[str], race: Race, device: str) -> None:
    """From cached latents."""
    spec = narrow(f, "vq")
    unet = spec.build_unet(device).to(memory_format=LAYOUTS[layout])
    inputs = spec.unet_inputs(BATCH, device)
    noise = torch.randn_like(inputs[0])
    step = _Training(lambda network: F.mse_loss(network(*inputs).sample, noise))
    race(contestants(unet, step, peers, diffusers_twin(unet, LAYOUTS[layout])), ROUNDS)


@pytest.mark.parametrize("peers", PEERS)
def test_first_stage(peers: Sequence[str], race: Race, device: str) -> None:
    """L1 and KL; what LPIPS and a discriminator add is the same for all."""
    spec = narrow(4, "kl", image_size=64)
    first_stage = spec.build_first_stage(device)
    assert first_stage is not None
    images = spec.images(BATCH, device)

    def loss(network: nn.Module) -> Tensor:
        posterior = network.encode(images).latent_dist
        reconstruction = network.decode(posterior.mode()).sample
        return F.l1_loss(reconstruction, images) + 1e-6 * posterior.kl().mean()

    race(contestants(first_stage, _Training(loss), peers, diffusers_twin(first_stage)), ROUNDS)
