"""A folder of 16×16 discs, and a study of it so small that it ends in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastldm.data import DataConfig
from fastldm.study import StudyConfig
from fastldm.study.config import DiffusionSettings, EvaluationSettings, FirstStageSettings

SIDE = 16

MakeStudy = Callable[..., StudyConfig]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 discs of random colour, place and size."""
    folder = tmp_path_factory.mktemp("discs")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number in range(32):
        centre, radius = random.uniform(5, 11, 2), random.uniform(2, 5)
        inside = np.hypot(rows - centre[0], columns - centre[1]) < radius
        pixels = np.where(inside[..., None], random.integers(0, 255, 3), 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def make_study(images: Path) -> MakeStudy:
    """A study's configuration: f = 1, KL and VQ at f = 2, few steps of narrow models."""

    def make(output_dir: Path, **fields: Any) -> StudyConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(output_dir),
            "data": DataConfig(str(images), resolution=SIDE, holdout_fraction=0.25),
            "kl": [2],
            "vq": [2],
            "budget_tflop": 0.001,
            "points": 2,
            "first_stage": FirstStageSettings(
                base_channels=4, norm_num_groups=2, codebook_size={2: 8}, batch_size=4
            ),
            "diffusion": DiffusionSettings(
                block_out_channels={1: [4, 4], 2: [8, 8]}, layers_per_block=1, batch_size=4,
                attention_sides=[4], attention_head_dim=4, norm_num_groups=2,
            ),
            "evaluation": EvaluationSettings(
                samples=6, num_inference_steps=2, batch_size=8, features="random_conv",
                bound_images=3, bound_groups=3,
            ),
            "cpu": True,
            "progress_bar": False,
        }  # fmt: skip
        return StudyConfig(**{**defaults, **fields})

    return make
