"""Both players under DDP, two gloo processes: the gradients of one process with all images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

STEP = """
import sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastldm.losses import FirstStageLoss, FirstStageLossConfig
from fastldm.models import PatchDiscriminator


def gradients(rank, world, result):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    discriminator = PatchDiscriminator(3, 4, 2, "actnorm")
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    latents = torch.randn(4, 4, 16, 16, generator=generator)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    loss = FirstStageLoss(FirstStageLossConfig(perceptual_weight=0.0, discriminator_start=0))
    players = (decoder.double(), discriminator.double())
    if world > 1:
        players = tuple(DistributedDataParallel(player) for player in players)
    for _ in range(2):
        reconstructions = players[0](latents[share].double())
        total, logs = loss.generator_loss(
            images[share].double(), reconstructions, discriminator=players[1],
            last_layer=decoder[-1].weight, global_step=0,
        )
        total.backward()
        disc_total, _ = loss.discriminator_loss(
            images[share].double(), reconstructions, discriminator=players[1], global_step=0
        )
        disc_total.backward()
    found = {
        f"{side}.{name}": parameter.grad
        for side, player in (("decoder", decoder), ("discriminator", discriminator))
        for name, parameter in player.named_parameters()
    }
    torch.save({**found, "d_weight": logs["d_weight"], "loc": discriminator.main[3].loc}, result)
"""
PROCESS = """
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
)
gradients(rank, 2, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    run_ranks(STEP + PROCESS, tmp_path)
    results = [tmp_path / f"{rank}.pt" for rank in range(2)]
    alone = tmp_path / "alone.pt"
    namespace: dict = {}
    exec(STEP, namespace)
    namespace["gradients"](0, 1, alone)
    expected = torch.load(alone, weights_only=True)
    assert expected["d_weight"] > 0
    for result in results:
        found = torch.load(result, weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)
