"""Two gloo processes on a CPU give the losses of one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.losses import FirstStageLossConfig
from fastldm.training import train_autoencoder, train_latent_diffusion
from fastldm.training.config import to_plain

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("distributed_script.py")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Without --multi_gpu accelerate starts one process on a machine without GPUs.
ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
]
AUTOENCODER_LOGS = (
    "total", "rec", "kl", "logvar", "d_weight", "logits_fake",
    "grad_norm_generator", "grad_norm_rec", "grad_norm_adv",
)  # fmt: skip

Metrics = Callable[[str], list[dict[str, Any]]]


def launch(launcher: list[str], folder: Path, **stages: Any) -> None:
    settings = folder / "stages.json"
    settings.write_text(json.dumps({name: to_plain(stage) for name, stage in stages.items()}))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    result = subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), str(settings)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def assert_same(
    one: list[dict[str, Any]], two: list[dict[str, Any]], names: Iterable[str], steps: int
) -> None:
    for first, second in zip(one[:steps], two[:steps], strict=True):
        # Rounding differs from the first update on, and grows.
        tolerance = 1e-6 if first["step"] == 1 else 2e-5
        for name in names:
            expected = pytest.approx(first[name], rel=tolerance, abs=1e-7)
            assert second[name] == expected, (name, first["step"])


@pytest.fixture
def autoencoder(autoencoder_config: Callable[..., Any]) -> Callable[..., Any]:
    """With a learned variance, a parameter of the loss that both processes must move alike."""
    loss = FirstStageLossConfig(perceptual_weight=0.0, discriminator_start=1, learn_logvar=True)

    def make(name: str, batch_size: int) -> Any:
        return autoencoder_config(name, batch_size=batch_size, loss=loss, adam_eps=1e-2)

    return make


@pytest.mark.slow
def test_torchrun(
    autoencoder: Callable[..., Any],
    diffusion_config: Callable[..., Any],
    metrics: Metrics,
    tmp_path: Path,
) -> None:
    fields = {"conditioning": "crossattn", "adam_eps": 1e-2}
    train_autoencoder(autoencoder("ae-one", 4))
    final = train_latent_diffusion(diffusion_config("ldm-one", batch_size=4, **fields))
    diffusion = diffusion_config("ldm-two", batch_size=2, **fields)
    # Two trainings of a vocabulary break ties by chance.
    diffusion.tokenizer.pretrained = str(final / "tokenizer")
    launch(TORCHRUN, tmp_path, autoencoder=autoencoder("ae-two", 2), diffusion=diffusion)
    one, two = metrics(str(tmp_path / "ae-one")), metrics(str(tmp_path / "ae-two"))
    assert_same(one, two, AUTOENCODER_LOGS, 3)
    one, two = metrics(str(tmp_path / "ldm-one")), metrics(str(tmp_path / "ldm-two"))
    assert_same(one, two, ("loss", "grad_norm_unet"), 3)


@pytest.mark.slow
def test_accelerate_launch(
    autoencoder: Callable[..., Any], metrics: Metrics, tmp_path: Path
) -> None:
    train_autoencoder(autoencoder("one", 4))
    # A machine without an accelerator needs no word of it.
    cpu = torch.accelerator.is_available()
    launch(ACCELERATE, tmp_path, autoencoder=replace(autoencoder("two", 2), cpu=cpu))
    one, two = metrics(str(tmp_path / "one")), metrics(str(tmp_path / "two"))
    assert_same(one, two, AUTOENCODER_LOGS, 3)
