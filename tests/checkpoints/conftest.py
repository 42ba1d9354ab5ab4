"""Names and shapes of CompVis's published models, and small whole models with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FACTS = json.loads(
    Path(__file__).parents[1].joinpath("golden", "compvis_checkpoints.json").read_text()
)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[int]]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def shapes_of(name: str) -> dict[str, list[int]]:
    """Every name in the file of a published model, with its shape."""
    model = FACTS["models"][name]

    def part(key: str, prefix: str) -> dict[str, list[int]]:
        tree = FACTS["parts"][model[key]] if key in model else {}
        return {prefix + leaf: shape for leaf, shape in _leaves(tree)}

    if name.startswith("first_stage/"):
        return part("first_stage", "")
    shapes = {buffer: [1000] for buffer in FACTS["schedule"]}
    if model.get("scale_factor"):
        shapes["scale_factor"] = []
    unet = part("unet", "diffusion_model.")
    shapes |= {f"model.{leaf}": shape for leaf, shape in unet.items()}
    if model.get("ema"):
        shapes |= {"model_ema.decay": [], "model_ema.num_updates": []}
        shapes |= {f"model_ema.{leaf.replace('.', '')}": shape for leaf, shape in unet.items()}
    return (
        shapes | part("first_stage", "first_stage_model.") | part("condition", "cond_stage_model.")
    )


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """The configurations of the published models, by name."""
    return FACTS["models"]


@pytest.fixture(scope="session")
def meta_tensors() -> Callable[[str], dict[str, Tensor]]:
    """The tensors of a published model's file, without storage."""

    def make(name: str) -> dict[str, Tensor]:
        return {
            leaf: torch.empty(
                shape,
                dtype=torch.int32 if leaf == "model_ema.num_updates" else torch.float32,
                device="meta",
            )
            for leaf, shape in shapes_of(name).items()
        }

    return make
