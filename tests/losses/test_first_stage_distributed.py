"""Both players under DDP, two gloo processes: the gradients of one process with all images."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
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
rank, store, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
gradients(rank, 2, result)
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(STEP) + PROCESS)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    results = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path / "store"), str(result)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    alone = tmp_path / "alone.pt"
    namespace: dict = {}
    exec(textwrap.dedent(STEP), namespace)
    namespace["gradients"](0, 1, alone)
    expected = torch.load(alone, weights_only=True)
    assert expected["d_weight"] > 0
    for result in results:
        found = torch.load(result, weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)
