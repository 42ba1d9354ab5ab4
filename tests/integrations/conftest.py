"""Tiny random components of diffusers' pipelines, and the same pipelines with ours in them."""

from __future__ import annotations

import copy
import string
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import fastldm

CONTEXT = 16
LENGTH = 8


class Tiny:
    """Builds components; each kind has the same weights for the same arguments."""

    context = CONTEXT

    def __init__(self) -> None:
        specials = ["<|startoftext|>", "<|endoftext|>"]
        letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
        vocabulary = {token: index for index, token in enumerate(specials + letters)}
        self.tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)

    def unet(self, **changes: Any) -> diffusers.UNet2DConditionModel:
        config = {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": CONTEXT,
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        torch.manual_seed(1)
        return diffusers.UNet2DConditionModel(**{**config, **changes}).eval()

    def sdxl_unet(self, **changes: Any) -> diffusers.UNet2DConditionModel:
        config = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + CONTEXT,
            "cross_attention_dim": 2 * CONTEXT,
        }
        return self.unet(**{**config, **changes})

    def vae(self, **changes: Any) -> diffusers.AutoencoderKL:
        config = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "sample_size": 16,
        }
        torch.manual_seed(2)
        return diffusers.AutoencoderKL(**{**config, **changes}).eval()

    def vqvae(self) -> diffusers.VQModel:
        torch.manual_seed(3)
        return diffusers.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            num_vq_embeddings=24,
        ).eval()

    def unconditional_unet(self, **changes: Any) -> diffusers.UNet2DModel:
        config = {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        torch.manual_seed(4)
        return diffusers.UNet2DModel(**{**config, **changes}).eval()

    def text_encoder(self, projected: bool = False) -> CLIPTextModel:
        config = CLIPTextConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=CONTEXT,
            intermediate_size=CONTEXT,
            projection_dim=CONTEXT,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=1,
        )
        torch.manual_seed(5)
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()

    def image_encoder(self) -> CLIPVisionModelWithProjection:
        config = CLIPVisionConfig(
            hidden_size=CONTEXT,
            intermediate_size=CONTEXT,
            projection_dim=CONTEXT,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        torch.manual_seed(6)
        return CLIPVisionModelWithProjection(config).eval()

    def image_processor(self) -> CLIPImageProcessor:
        return CLIPImageProcessor(size=16, crop_size=16)

    def scheduler(self, **changes: Any) -> diffusers.DDIMScheduler:
        config = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        return diffusers.DDIMScheduler(**{**config, **changes})

    def controlnet(self) -> diffusers.ControlNetModel:
        torch.manual_seed(7)
        controlnet = diffusers.ControlNetModel.from_unet(
            self.unet(),
            conditioning_embedding_out_channels=(8, 8),
            load_weights_from_unet=False,
        )
        for parameter in controlnet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return controlnet.eval()

    def stable_diffusion(self, **parts: Any) -> dict[str, Any]:
        """Components of a Stable Diffusion pipeline."""
        return {
            "vae": self.vae(),
            "text_encoder": self.text_encoder(),
            "tokenizer": self.tokenizer,
            "unet": self.unet(),
            "scheduler": self.scheduler(),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
            **parts,
        }

    def stable_diffusion_xl(self, **parts: Any) -> dict[str, Any]:
        """Components of an SDXL pipeline."""
        return {
            "vae": self.vae(force_upcast=True),
            "text_encoder": self.text_encoder(),
            "text_encoder_2": self.text_encoder(projected=True),
            "tokenizer": self.tokenizer,
            "tokenizer_2": self.tokenizer,
            "unet": self.sdxl_unet(),
            "scheduler": self.scheduler(),
            **parts,
        }

    @staticmethod
    def ours(component: Any) -> Any:
        """fastldm's object with the config and the weights of a component of diffusers."""
        name = type(component).__name__
        if not type(component).__module__.startswith("diffusers.") or not hasattr(fastldm, name):
            return copy.deepcopy(component)
        twin = getattr(fastldm, name).from_config(component.config)
        if isinstance(component, torch.nn.Module):
            twin.load_state_dict(component.state_dict())
            twin.eval()
        return twin

    def pair(self, pipeline: type[Any], parts: dict[str, Any]) -> tuple[Any, Any]:
        """The pipeline with diffusers' components and with ours."""
        pipelines = pipeline(**parts), pipeline(**{k: self.ours(v) for k, v in parts.items()})
        for pipe in pipelines:
            pipe.set_progress_bar_config(disable=True)
        return pipelines

    @staticmethod
    def picture(side: int = 16, seed: int = 0) -> torch.Tensor:
        """[1, 3, side, side] in [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(1, 3, side, side, generator=generator)

    @staticmethod
    def images(pipe: Any, *arguments: Any, **keywords: Any) -> np.ndarray:
        """Images of two steps from a fixed seed."""
        keywords = {"num_inference_steps": 2, "output_type": "np", **keywords}
        generator = torch.Generator().manual_seed(11)
        torch.manual_seed(12)  # some pipelines let their scheduler draw from the global generator
        return np.asarray(pipe(*arguments, generator=generator, **keywords).images)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()
