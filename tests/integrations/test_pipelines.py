"""Every pipeline of the LDM family with our models and scheduler in place of diffusers'."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

PROMPT = {"prompt": "a cat", "negative_prompt": "dull", "guidance_scale": 3.0}


def assert_same(tiny: Any, pipelines: tuple[Any, Any], *arguments: Any, **keywords: Any) -> None:
    """Equal images, of which the first has some contrast."""
    expected, actual = (tiny.images(pipe, *arguments, **keywords) for pipe in pipelines)
    assert expected.shape == actual.shape
    assert expected.std() > 0.01
    assert np.abs(actual - expected).max() < 1e-3


def test_text_to_image(tiny: Any) -> None:
    pipelines = tiny.pair(diffusers.StableDiffusionPipeline, tiny.stable_diffusion())
    assert_same(tiny, pipelines, **PROMPT)
    assert_same(tiny, pipelines, "a cat", guidance_scale=1.0, num_images_per_prompt=2)
    assert_same(tiny, pipelines, height=16, width=24, guidance_rescale=0.7, eta=0.5, **PROMPT)


def test_text_to_image_of_velocity(tiny: Any) -> None:
    parts = tiny.stable_diffusion(
        unet=tiny.unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=tiny.scheduler(prediction_type="v_prediction"),
    )
    assert_same(tiny, tiny.pair(diffusers.StableDiffusionPipeline, parts), **PROMPT)


def test_a_scheduler_config_that_the_pipeline_corrects(tiny: Any) -> None:
    parts = tiny.stable_diffusion(scheduler=tiny.scheduler(steps_offset=0, clip_sample=True))
    pipelines = tiny.pair(diffusers.StableDiffusionPipeline, parts)
    assert pipelines[1].scheduler.config.steps_offset == 1
    assert pipelines[1].scheduler.config.clip_sample is False
    assert_same(tiny, pipelines, **PROMPT)


def test_sdxl(tiny: Any) -> None:
    pipelines = tiny.pair(diffusers.StableDiffusionXLPipeline, tiny.stable_diffusion_xl())
    assert_same(tiny, pipelines, original_size=(64, 32), crops_coords_top_left=(4, 8), **PROMPT)


def test_sdxl_refiner(tiny: Any) -> None:
    unet = tiny.sdxl_unet(
        cross_attention_dim=tiny.context,
        projection_class_embeddings_input_dim=5 * 4 + tiny.context,
    )
    parts = tiny.stable_diffusion_xl(unet=unet, text_encoder=None, tokenizer=None)
    pipelines = tiny.pair(
        diffusers.StableDiffusionXLImg2ImgPipeline, {**parts, "requires_aesthetics_score": True}
    )
    image = tiny.picture()
    assert_same(tiny, pipelines, image=image, strength=0.8, num_inference_steps=4, **PROMPT)


def test_image_to_image(tiny: Any) -> None:
    pipelines = tiny.pair(diffusers.StableDiffusionImg2ImgPipeline, tiny.stable_diffusion())
    image = tiny.picture()
    assert_same(tiny, pipelines, image=image, strength=0.7, num_inference_steps=4, **PROMPT)


@pytest.mark.parametrize("in_channels", [4, 9])
def test_inpainting(tiny: Any, in_channels: int) -> None:
    parts = tiny.stable_diffusion(unet=tiny.unet(in_channels=in_channels))
    pipelines = tiny.pair(diffusers.StableDiffusionInpaintPipeline, parts)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12] = 1.0
    masked = {"image": 2 * tiny.picture() - 1, "mask_image": mask, "height": 16, "width": 16}
    assert_same(tiny, pipelines, strength=1.0, **masked, **PROMPT)


def test_upscaling(tiny: Any) -> None:
    unet = tiny.unet(in_channels=7, num_class_embeds=400, only_cross_attention=(True, False))
    parts = tiny.stable_diffusion(
        unet=unet, vae=tiny.vae(scaling_factor=0.08333), low_res_scheduler=diffusers.DDPMScheduler()
    )
    for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        parts.pop(name)
    pipelines = tiny.pair(
        diffusers.StableDiffusionUpscalePipeline, {**parts, "max_noise_level": 350}
    )
    assert_same(tiny, pipelines, image=tiny.picture(8), noise_level=20, **PROMPT)


def test_depth_to_image(tiny: Any) -> None:
    parts = tiny.stable_diffusion(
        unet=tiny.unet(in_channels=5), depth_estimator=None, feature_extractor=None
    )
    for name in ("safety_checker", "requires_safety_checker"):
        parts.pop(name)
    pipelines = tiny.pair(diffusers.StableDiffusionDepth2ImgPipeline, parts)
    depth = torch.linspace(-1, 1, 64).view(1, 8, 8)
    inputs = {"image": tiny.picture(), "depth_map": depth, "num_inference_steps": 4}
    assert_same(tiny, pipelines, strength=0.7, **inputs, **PROMPT)


def test_instructions(tiny: Any) -> None:
    parts = tiny.stable_diffusion(unet=tiny.unet(in_channels=8))
    pipelines = tiny.pair(diffusers.StableDiffusionInstructPix2PixPipeline, parts)
    assert_same(tiny, pipelines, image=tiny.picture(), image_guidance_scale=1.5, **PROMPT)


def test_image_variations(tiny: Any) -> None:
    parts = {
        "vae": tiny.vae(),
        "image_encoder": tiny.image_encoder(),
        "unet": tiny.unet(),
        "scheduler": tiny.scheduler(),
        "safety_checker": None,
        "feature_extractor": tiny.image_processor(),
        "requires_safety_checker": False,
    }
    pipelines = tiny.pair(diffusers.StableDiffusionImageVariationPipeline, parts)
    assert_same(tiny, pipelines, tiny.picture(), height=16, width=16, guidance_scale=3.0)


def ldm_bert(tiny: Any) -> LDMBertModel:
    torch.manual_seed(8)
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tiny.tokenizer),
            d_model=tiny.context,
            encoder_layers=1,
            encoder_ffn_dim=tiny.context,
            encoder_attention_heads=2,
            head_dim=8,
        )
    ).eval()


def test_ldm_text_to_image(tiny: Any) -> None:
    parts = {
        "vqvae": tiny.vae(),
        "bert": ldm_bert(tiny),
        "tokenizer": tiny.tokenizer,
        "unet": tiny.unet(),
        "scheduler": tiny.scheduler(),
    }
    pipelines = tiny.pair(diffusers.LDMTextToImagePipeline, parts)
    assert_same(tiny, pipelines, ["a cat"], height=64, width=64, guidance_scale=3.0, eta=0.3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ldm_super_resolution(tiny: Any, eta: float) -> None:
    parts = {
        "vqvae": tiny.vqvae(),
        "unet": tiny.unconditional_unet(in_channels=6),
        "scheduler": tiny.scheduler(),
    }
    pipelines = tiny.pair(diffusers.LDMSuperResolutionPipeline, parts)
    assert_same(tiny, pipelines, tiny.picture(8), eta=eta)


def test_ldm_unconditional(tiny: Any) -> None:
    parts = {
        "vqvae": tiny.vqvae(),
        "unet": tiny.unconditional_unet(),
        "scheduler": tiny.scheduler(),
    }
    pipelines = tiny.pair(diffusers.LDMPipeline, parts)
    assert_same(tiny, pipelines, batch_size=2, eta=1.0)


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_pixels(tiny: Any, name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    parts = {"unet": tiny.unconditional_unet(), "scheduler": scheduler}
    assert_same(tiny, tiny.pair(getattr(diffusers, f"{name}Pipeline"), parts))
