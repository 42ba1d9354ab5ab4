"""The tables of docs/coming_from_compvis.md against the code that they describe."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from torch import Tensor

import fastldm
from fastldm import (
    AutoencoderKL,
    DDIMScheduler,
    FirstStageLossConfig,
    LatentDiffusion,
    PatchDiscriminator,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
    losses,
)
from fastldm.checkpoints import condition_params, first_stage_params
from fastldm.checkpoints.first_stage_params import CoderParams
from fastldm.checkpoints.ldm_params import DiffusionParams
from fastldm.checkpoints.loss_params import KLLossParams, VQLossParams
from fastldm.checkpoints.single_file import model_rows
from fastldm.checkpoints.unet_params import UNetParams
from fastldm.losses.diffusion import DiffusionLossConfig
from fastldm.modules import distributions, quantize
from fastldm.training import ema
from tests.checkpoints.conftest import FACTS

PAGE = Path(__file__).parents[2].joinpath("docs", "coming_from_compvis.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def arguments(*kinds: type) -> set[str]:
    return {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}


def test_classes() -> None:
    documented = {names(theirs)[0]: ours for theirs, ours in table("Classes")}
    known = {**first_stage_params.CLASSES}
    known |= {target: kind for target, (kind, _, _) in condition_params._KINDS.items()}
    assert documented.keys() == {"UNetModel", *known}
    for target, kind in known.items():
        assert kind in names(documented[target])
        assert kind == "CLIPTextModel" or hasattr(fastldm, kind)


@pytest.mark.parametrize(
    ("heading", "theirs", "ours"),
    [
        (
            "Arguments of `UNetModel`",
            {field.name for field in fields(UNetParams)},
            arguments(UNet2DModel, UNet2DConditionModel)
            | {"UNet2DModel", "UNet2DConditionModel", "num_heads", "false"},
        ),
        (
            "Arguments of a first stage",
            {field.name for field in fields(CoderParams)} | {"embed_dim", "n_embed", "remap"},
            arguments(AutoencoderKL, VQModel)
            | {"AutoencoderKL", "VQModel", "false", "quantize.used"},
        ),
        (
            "Arguments of the first stage's losses",
            {field.name for kind in (KLLossParams, VQLossParams) for field in fields(kind)},
            arguments(PatchDiscriminator)
            | {field.name for field in fields(FirstStageLossConfig)}
            | {"false", "lpips"},
        ),
        (
            "Arguments of `LatentDiffusion`",
            {field.name for field in fields(DiffusionParams)},
            arguments(DDIMScheduler, LatentDiffusion)
            | {f"loss.{field.name}" for field in fields(DiffusionLossConfig)}
            | {"sample_size", "scale_factor", "conditioning_key"}
            | {"linear", "scaled_linear", "sqrt_linear", "cosine", "squaredcos_cap_v2"}
            | {"eps", "x0", "v", "epsilon", "sample", "v_prediction"}
            | {"crossattn", "concat", "hybrid", "adm", "class"},
        ),
    ],
)
def test_arguments(heading: str, theirs: set[str], ours: set[str]) -> None:
    rows = table(heading)
    assert [name for left, _ in rows for name in names(left)] == [names(row[0])[0] for row in rows]
    assert {names(left)[0] for left, _ in rows} == theirs
    for _, right in rows:
        assert set(names(right)) <= ours, right


def test_training() -> None:
    homes = (fastldm, losses, quantize, distributions, ema)
    for _, ours in table("Training"):
        for name in names(ours):
            path = name.split("(")[0].split(".")
            if path[0] in ("add_noise", "get_velocity"):
                path = ["DDIMScheduler", *path]
            owner = next(home for home in homes if hasattr(home, path[0]))
            assert callable(getattr(owner, path[0]))
            assert all(hasattr(getattr(owner, path[0]), leaf) for leaf in path[1:2])


@pytest.mark.parametrize("file", sorted({names(row[0])[0] for row in table("Names of weights")}))
def test_names_of_weights(file: str, meta_tensors: Callable[[str], dict[str, Tensor]]) -> None:
    model = LatentDiffusion.from_single_file(
        meta_tensors(file), config=FACTS["models"][file]["config"]
    )
    parts = {
        "model.diffusion_model.": model.unet,
        "first_stage_model.": model.first_stage,
        "cond_stage_model.": model.conditioner,
    }
    ours = {
        prefix + row.theirs: list(row.ours)
        for prefix, part in parts.items()
        if part is not None
        for row in model_rows(part)
    }
    rows = [row for row in table("Names of weights") if names(row[0]) == [file]]
    assert rows
    for _, left, right in rows:
        assert ours[names(left)[0]] == names(right)
