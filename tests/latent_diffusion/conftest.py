"""Tiny parts of every kind, as factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastldm import (
    AutoencoderKL,
    CaptionTokenizer,
    ClassEmbedder,
    DDIMScheduler,
    LatentDiffusion,
    TextEncoder,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from fastldm.configuration import FrozenConfig
from fastldm.models.tokenizer import train_tokenizer
from fastldm.outputs import BaseOutput

CAPTIONS = ["a red cat", "a blue dog", "flag of France", "smiling face"]
_LEVELS = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "latent_channels": 3,
}


def make_first_stage(kind: str = "kl", **fields: Any) -> nn.Module:
    if kind == "kl":
        return AutoencoderKL(**{**_LEVELS, **fields})
    return VQModel(**{**_LEVELS, "num_vq_embeddings": 16, **fields})


def make_unet(**fields: Any) -> UNet2DModel:
    values = {
        "sample_size": 4,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**{**values, **fields})


def make_cross_unet(**fields: Any) -> UNet2DConditionModel:
    values = {
        "sample_size": 4,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    return UNet2DConditionModel(**{**values, **fields})


def make_scheduler(**fields: Any) -> DDIMScheduler:
    values = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**values, **fields})


def make_tokenizer() -> CaptionTokenizer:
    return train_tokenizer(CAPTIONS, 100, max_length=8)


def make_text_encoder(**fields: Any) -> TextEncoder:
    values = {
        "vocab_size": 100,
        "max_length": 8,
        "hidden_size": 12,
        "num_layers": 1,
        "num_heads": 2,
        "head_dim": 6,
    }
    return TextEncoder(**{**values, **fields})


def make_model(kind: str = "none", **options: Any) -> LatentDiffusion:
    """A model of every kind of conditioning; "classes" is a ClassEmbedder in cross-attention."""
    parts: dict[str, Any] = {
        "first_stage": make_first_stage(),
        "scheduler": make_scheduler(),
        "unet": make_unet(),
        "conditioning": kind,
    }
    if kind == "concat":
        parts["unet"] = make_unet(in_channels=5)
    elif kind == "class":
        parts["unet"] = make_unet(num_class_embeds=4)
    elif kind == "classes":
        parts |= {
            "conditioning": "crossattn",
            "unet": make_cross_unet(),
            "conditioner": ClassEmbedder(3, 12),
        }
    elif kind in ("crossattn", "hybrid"):
        parts |= {
            "unet": make_cross_unet(in_channels=5 if kind == "hybrid" else 3),
            "conditioner": make_text_encoder(),
            "tokenizer": make_tokenizer(),
        }
    return LatentDiffusion(**{**parts, **options})


def make_condition(kind: str, count: int = 3) -> Any:
    """A batch of conditions that `make_model` of the same kind takes."""
    concat = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    captions = [CAPTIONS[index % len(CAPTIONS)] for index in range(count)]
    return {
        "none": None,
        "concat": concat,
        "class": torch.arange(count) % 3,
        "classes": torch.arange(count) % 3,
        "crossattn": captions,
        "hybrid": {"crossattn": captions, "concat": concat},
    }[kind]


class Prediction(BaseOutput):
    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


class Oracle(nn.Module):
    """A UNet whose prediction a function gives; it keeps what it was called with."""

    def __init__(self, function: Callable[..., torch.Tensor], **config: Any) -> None:
        super().__init__()
        values = {"in_channels": 3, "out_channels": 3, "sample_size": 4}
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        self.config = FrozenConfig({**values, **blocks, **config})
        self.weight = nn.Parameter(torch.ones(()))
        self.function = function
        self.calls: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **inputs: Any) -> Prediction:
        self.calls.append((sample, timestep, inputs))
        return Prediction(self.function(sample, timestep, **inputs))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def build() -> Any:
    """The factories of this file, since test modules cannot import it."""

    class Factories:
        captions = CAPTIONS
        first_stage = staticmethod(make_first_stage)
        unet = staticmethod(make_unet)
        cross_unet = staticmethod(make_cross_unet)
        scheduler = staticmethod(make_scheduler)
        tokenizer = staticmethod(make_tokenizer)
        text_encoder = staticmethod(make_text_encoder)
        model = staticmethod(make_model)
        condition = staticmethod(make_condition)
        oracle = Oracle

    return Factories
