"""All published models of CompVis at full size, without storage: names, shapes and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from fastldm import LatentDiffusion
from fastldm.checkpoints import compvis_state_dict, split_tensors
from fastldm.checkpoints.whole_saving import Saved, whole_state_dict
from fastldm.models import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from tests.checkpoints.conftest import FACTS

FIRST_STAGES = [name for name in FACTS["models"] if name.startswith("first_stage/")]
WHOLE = [name for name in FACTS["models"] if name.startswith("ldm/")]
Meta = Callable[[str], dict[str, Tensor]]


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_there_are_28() -> None:
    assert (len(FIRST_STAGES), len(WHOLE)) == (9, 19)


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "inferred"])
@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages(
    name: str, with_config: bool, facts: dict[str, Any], meta_tensors: Meta
) -> None:
    tensors = meta_tensors(name)
    kind = VQModel if "vq" in name else AutoencoderKL
    config = facts[name]["config"] if with_config else None
    model = kind.from_single_file(tensors, config=config)
    assert round(model.num_parameters() / 1e6, 2) == facts[name]["millions"]
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert shapes(compvis_state_dict(model)) == shapes(tensors)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name: str, facts: dict[str, Any], meta_tensors: Meta) -> None:
    tensors, params = meta_tensors(name), facts[name]["config"]["params"]
    model = LatentDiffusion.from_single_file(tensors, config=facts[name]["config"])
    assert round(model.unet.num_parameters() / 1e6, 2) == facts[name]["millions"]
    if name == "ldm/txt2img-1p4B-eval":
        assert model.conditioner.num_parameters() == 581_994_042
    assert model.latent_scale.factor == params.get("scale_factor", 1.0)
    assert model.objective.config.loss_type == params.get("loss_type", "l2")
    scheduler = model.scheduler.config
    assert scheduler["beta_schedule"] == "scaled_linear"
    assert scheduler["beta_start"] == params["linear_start"]
    assert scheduler["beta_end"] == params["linear_end"]
    assert model.unet.config["sample_size"] == params["image_size"]
    saved = Saved(
        model.unet, model.first_stage, model.conditioner, scheduler, model.latent_scale.factor
    )
    assert shapes(whole_state_dict(saved, model.file_layout)) == shapes(tensors)


@pytest.mark.parametrize("name", {FACTS["models"][name]["unet"]: name for name in WHOLE}.values())
def test_a_unet_and_its_heads_are_told_without_a_config(
    name: str, facts: dict[str, Any], meta_tensors: Meta
) -> None:
    tensors = meta_tensors(name)
    attends = any("transformer_blocks" in leaf for leaf in split_tensors(tensors, name).unet)
    kind = UNet2DConditionModel if attends else UNet2DModel
    stated = kind.from_single_file(tensors, config=facts[name]["config"])
    inferred = kind.from_single_file(tensors)
    assert {**inferred.config, "sample_size": stated.config["sample_size"]} == stated.config


@pytest.mark.parametrize(
    "name", ["ldm/cin256", "ldm/txt2img-1p4B-eval", "ldm/semantic_synthesis256"]
)
def test_a_whole_model_is_told_without_a_config(
    name: str, facts: dict[str, Any], meta_tensors: Meta
) -> None:
    tensors = meta_tensors(name)
    stated = LatentDiffusion.from_single_file(tensors, config=facts[name]["config"])
    inferred = LatentDiffusion.from_single_file(tensors, scheduler=stated.scheduler)
    assert inferred.conditioning == stated.conditioning
    assert inferred.conditioner.config == stated.conditioner.config
    assert type(inferred.first_stage) is type(stated.first_stage)
