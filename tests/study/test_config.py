from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastldm.cli.parsing import parse_config
from fastldm.errors import ConfigError
from fastldm.study import StudyConfig
from fastldm.study.cells import cells_of, diffusion_training, first_stage_training
from fastldm.study.config import DiffusionSettings, FirstStageSettings

from .conftest import MakeStudy

CONFIGS = Path(__file__).parents[2] / "configs" / "study"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl": [3]}, "kl: f must be one of 2, 4, 8, 16, 32, got 3"),
        ({"vq": [1]}, "vq: f must be one of"),
        ({"kl": [32]}, r"kl: f = 32 does not divide data.resolution = 16"),
        ({"kl": [16]}, r"kl: f = 16 does not divide data.resolution = 16 into latents of at least"),
        ({"kl": [2, 2]}, r"kl: an f is there twice: \[2, 2\]"),
        ({"pixel": False, "kl": [], "vq": []}, "there is nothing to train"),
        ({"budget_minutes": 1}, "budget_tflop, budget_minutes: give one of them"),
        ({"budget_tflop": None}, "give one of them"),
        ({"budget_tflop": -1}, "budget_tflop: expected a number above 0, got -1"),
        ({"first_stage_share": 1.0}, r"first_stage_share: expected a number in \(0, 1\)"),
        ({"points": 0}, "points: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_values(
    make_study: MakeStudy, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_study(tmp_path, **fields)


def test_an_f_without_channels(make_study: MakeStudy, tmp_path: Path) -> None:
    config = make_study(tmp_path, first_stage=FirstStageSettings(kl_channels={4: 3}))
    with pytest.raises(ConfigError, match=r"first_stage.kl_channels: no entry for f = 2; .*\[4\]"):
        first_stage_training(cells_of(config)[1], config, max_steps=1)


def test_models_by_default_are_as_in_the_paper(make_study: MakeStudy, tmp_path: Path) -> None:
    stage = FirstStageSettings(base_channels=128)
    assert stage.block_out_channels(4) == [128, 256, 512]
    assert stage.block_out_channels(8) == [128, 256, 512, 512]
    diffusion = DiffusionSettings(base_channels=224)
    assert diffusion.channels(4, 64) == [224, 448, 672, 896]
    assert diffusion.channels(32, 8) == [224, 448]
    config = make_study(tmp_path, diffusion=DiffusionSettings(attention_sides=[8]))
    cell = cells_of(config)[1]
    unet = diffusion_training(cell, config, tmp_path, max_steps=1).unet.config
    assert unet["down_block_types"] == ["AttnDownBlock2D", "DownBlock2D"]
    assert unet["up_block_types"] == ["UpBlock2D", "AttnUpBlock2D"]


def test_pixels_are_not_scaled_and_have_no_cache(make_study: MakeStudy, tmp_path: Path) -> None:
    config = make_study(tmp_path)
    pixel, latent = (
        diffusion_training(c, config, tmp_path, max_steps=1) for c in cells_of(config)[:2]
    )
    assert (pixel.scaling, pixel.latent_cache) == ("first_stage", None)
    assert latent.scaling == "first_batch"
    assert latent.latent_cache == str(tmp_path / "cells" / "kl-f2" / "latents")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_read(path: Path) -> None:
    config = parse_config(StudyConfig, ["--config", str(path)], "study", "")
    for cell in cells_of(config):
        diffusion_training(cell, config, Path("first_stage"), max_steps=1)
        if not cell.is_pixel:
            first_stage_training(cell, config, max_steps=1)
