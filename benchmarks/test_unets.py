"""A denoising step of narrow UNets of the paper's shape, unconditional and class-conditional."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from benchmarks.contestants import LAYOUTS, PEERS, Results, contestants, diffusers_twin
from benchmarks.timing import Race
from fastldm.profiling import narrow

BATCH = 2
ROUNDS = 9


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conditioning", ["none", "class"])
@pytest.mark.parametrize("f", [4, 8], ids="f={}".format)
def test_step(
    f: int, conditioning: str, layout: str, peers: Sequence[str], race: Race, device: str
) -> None:
    spec = narrow(f, "vq", conditioning)
    unet = spec.build_unet(device).eval().to(memory_format=LAYOUTS[layout])
    inputs = spec.unet_inputs(BATCH, device)

    @torch.no_grad()
    def work(network: nn.Module) -> Results:
        return (network(*inputs).sample,)

    race(contestants(unet, work, peers, diffusers_twin(unet, LAYOUTS[layout])), ROUNDS)
