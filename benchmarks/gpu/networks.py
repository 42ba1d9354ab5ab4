"""Networks of Stable Diffusion with fresh weights, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.models import AutoencoderKL, UNet2DConditionModel

Inputs = tuple[Tensor, ...]
Build = Callable[[bool], tuple[nn.Module, Inputs]]
"""Given whether the network is to be tiny: a network that returns a tensor, and its inputs."""

_POOLED_WIDTH, _TIME_IDS, _TIME_WIDTH = 1280, 6, 256


class _Denoiser(nn.Module):
    """SDXL's pooled text and sizes are inputs like the others."""

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, *added: Tensor) -> Tensor:
        conditions = dict(zip(("text_embeds", "time_ids"), added, strict=False))
        found: Tensor = self.model(
            sample, timestep, context, added_cond_kwargs=conditions or None
        ).sample
        return found


class _Decoder(nn.Module):
    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.model.decode(z).sample
        return image


def stable_diffusion_unet(tiny: bool) -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 1.5 at 512² with guidance."""
    side, keys, width = (8, 5, 32) if tiny else (64, 77, 768)
    model = UNet2DConditionModel(
        block_out_channels=(32,) * 4 if tiny else (320, 640, 1280, 1280),
        cross_attention_dim=width,
        attention_head_dim=2 if tiny else 8,
        layers_per_block=1 if tiny else 2,
    )
    inputs = torch.randn(2, 4, side, side), torch.tensor(500), torch.randn(2, keys, width)
    return _Denoiser(model), inputs


def sdxl_unet(tiny: bool) -> tuple[nn.Module, Inputs]:
    """SDXL base at 1024² with guidance."""
    side, keys, width = (8, 5, 32) if tiny else (128, 77, 2048)
    pooled, time_width = (16, 8) if tiny else (_POOLED_WIDTH, _TIME_WIDTH)
    size: dict[str, Any] = (
        {
            "block_out_channels": (32, 32, 32),
            "attention_head_dim": (2, 2, 2),
            "transformer_layers_per_block": (1, 1, 2),
            "layers_per_block": 1,
        }
        if tiny
        else {
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
        }
    )
    model = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=pooled + _TIME_IDS * time_width,
        **size,
    )
    return _Denoiser(model), (
        torch.randn(2, 4, side, side), torch.tensor(500), torch.randn(2, keys, width),
        torch.randn(2, pooled), torch.full((2, _TIME_IDS), 1024.0),
    )  # fmt: skip


def decoder(image_size: int) -> Build:
    """Stable Diffusion's and SDXL's first stage, which differ in their weights alone."""

    def build(tiny: bool) -> tuple[nn.Module, Inputs]:
        levels, side = ((32, 32), 4) if tiny else ((128, 256, 512, 512), image_size // 8)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(levels),
            up_block_types=("UpDecoderBlock2D",) * len(levels),
            block_out_channels=levels,
            layers_per_block=1 if tiny else 2,
        )
        return _Decoder(model), (torch.randn(1, 4, side, side),)

    return build
