"""A tiny folder of images and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastldm.cli import main

Run = Callable[..., str]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve 16×16 images in two classes, each with a caption beside it."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(12):
        kind = ("dark", "light")[number % 2]
        (folder / kind).mkdir(exist_ok=True)
        base = 60 if kind == "dark" else 190
        pixels = np.clip(base + random.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / kind / f"{number:02}.png")
        (folder / kind / f"{number:02}.txt").write_text(f"a {kind} square")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return what it printed, after checking its exit status."""

    def call(*arguments: object, status: int = 0) -> str:
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert code == status, shown.err
        return shown.out if status == 0 else shown.err

    return call


FIRST_STAGE = """
model:
  class_name: AutoencoderKL
  config:
    block_out_channels: [8, 8]
    down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D]
    up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]
    norm_num_groups: 4
    mid_block_add_attention: false
loss: {perceptual_weight: 0.0, discriminator_start: 1}
discriminator: {class_name: PatchDiscriminator, config: {base_channels: 4, num_layers: 1}}
batch_size: 4
max_steps: 2
learning_rate: 1e-3
sample_images: 2
validation_images: 2
tensorboard: false
progress_bar: false
cpu: true
"""

SECOND_STAGE = """
unet:
  class_name: UNet2DConditionModel
  config:
    block_out_channels: [8, 8]
    down_block_types: [DownBlock2D, CrossAttnDownBlock2D]
    up_block_types: [CrossAttnUpBlock2D, UpBlock2D]
    layers_per_block: 1
    norm_num_groups: 4
    num_attention_heads: 2
conditioning_dropout: 0.1
sampling: {num_inference_steps: 2, guidance_scale: 1.5}
batch_size: 4
max_steps: 2
sample_images: 2
validation_images: 2
tensorboard: false
progress_bar: false
cpu: true
"""


@pytest.fixture
def first_stage_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "first_stage.yaml"
    path.write_text(FIRST_STAGE)
    return path


@pytest.fixture
def second_stage_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "second_stage.yaml"
    path.write_text(SECOND_STAGE)
    return path
