from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastldm.errors import ConfigError
from fastldm.losses import FirstStageLossConfig
from fastldm.models import UNet2DModel
from fastldm.study.cells import Cell, cells_of
from fastldm.study.config import FirstStageSettings
from fastldm.study.costs import Costs, count_flops, measure_costs, plan

from .conftest import MakeStudy


def products_of(model: nn.Module, *inputs: Any) -> int:
    """Twice the multiplications of a forward pass, from the shapes that hooks see."""
    found = []

    def convolution(module: Any, _: Any, output: torch.Tensor) -> None:
        found.append(2 * output.numel() * module.weight[0].numel())

    def linear(module: Any, inputs: Any, output: torch.Tensor) -> None:
        found.append(2 * output.numel() * module.in_features)

    def attention(module: Any, inputs: Any, output: torch.Tensor) -> None:
        batch, channels, height, width = inputs[0].shape
        found.append(2 * 2 * batch * channels * (height * width) ** 2)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention)
    with torch.no_grad():
        model(*inputs)
    return sum(found)


def test_operations_are_those_of_every_convolution_linear_layer_and_attention() -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    with torch.no_grad():
        forward = count_flops(lambda: unet(*inputs))
    assert forward == products_of(unet, *inputs)
    # Each product has two in the backward pass, of attention one is computed anew.
    both = count_flops(lambda: unet(*inputs).sample.sum().backward())
    assert 2.9 * forward < both < 3.2 * forward


def costs(**fields: Any) -> Costs:
    values: dict[str, Any] = {
        "first_stage_step": 10, "adversarial_step": 30, "adversarial_start": 4, "encoding": 7,
        "diffusion_step": 20, "denoising": 1, "decoding": 1, "first_stage_parameters": 1,
        "unet_parameters": 1, "latent_shape": [1, 2, 2],
    }  # fmt: skip
    return Costs(**{**values, **fields})


def test_a_budget_buys_cheap_steps_and_then_adversarial_ones() -> None:
    found = costs()
    assert [found.first_stage_steps(budget) for budget in (9, 10, 49, 69, 70, 101)] == [
        0, 1, 4, 4, 5, 6,
    ]  # fmt: skip
    for steps in range(8):
        assert found.first_stage_steps(found.first_stage(steps)) == steps


def test_the_plan_keeps_the_shares(make_study: MakeStudy, tmp_path: Path) -> None:
    config = make_study(tmp_path, budget_tflop=1000e-12, first_stage_share=0.25, points=3)
    bought = plan(Cell(2, "kl"), config, costs(adversarial_start=100))
    assert bought.first_stage == {"max_steps": 25}
    # (750 − 7) // 20 = 37 steps, in three parts.
    assert [point["max_steps"] for point in bought.points] == [12, 24, 37]
    pixel = plan(Cell(1, "none"), config, costs(encoding=0))
    assert pixel.first_stage == {}
    assert pixel.points[-1] == {"max_steps": 50}
    with pytest.raises(ConfigError, match="one training step of the first stage needs a budget"):
        plan(Cell(2, "kl"), config, costs(first_stage_step=300))
    minutes = make_study(tmp_path, budget_tflop=None, budget_minutes=8, first_stage_share=0.25)
    bought = plan(Cell(2, "kl"), minutes, costs())
    assert bought.first_stage == {"max_minutes": 2}
    assert [point["max_minutes"] for point in bought.points] == [3, 6]


def test_costs_of_a_cell(make_study: MakeStudy, tmp_path: Path) -> None:
    """The discriminator counts from its start; a step without a cache encodes its images."""
    loss = FirstStageLossConfig(perceptual_weight=0.0, discriminator_start=2)
    config = make_study(
        tmp_path, pixel=False, vq=[],
        first_stage=FirstStageSettings(
            base_channels=4, norm_num_groups=2, batch_size=2, loss=loss,
            discriminator={"base_channels": 4, "num_layers": 1},
        ),
    )  # fmt: skip
    (cell,) = cells_of(config)
    cached = measure_costs(cell, config, num_images=10)
    assert cached.adversarial_start == 2
    assert cached.adversarial_step > cached.first_stage_step > 0
    assert cached.latent_shape == [2, 8, 8]
    config.diffusion.latent_cache = False
    direct = measure_costs(cell, config, num_images=10)
    assert direct.encoding == 0
    assert direct.diffusion_step - cached.diffusion_step == cached.encoding / 10 * 4
