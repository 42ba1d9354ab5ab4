from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastldm import DDIMScheduler, LatentDiffusion, UNet2DModel
from fastldm.errors import ConfigError, DataError
from fastldm.models import IdentityFirstStage
from fastldm.training.registry import load_first_stage


def test_images_are_their_own_latents(tmp_path: Path) -> None:
    stage = IdentityFirstStage(2)
    images = torch.rand(3, 2, 5, 7)
    assert stage.encode(images).latents is images
    assert stage.decode(images).sample is images
    assert stage(images, return_dict=False)[0] is images
    assert stage.downsampling_factor == 1
    stage.save_pretrained(tmp_path)
    loaded = load_first_stage(tmp_path)
    assert isinstance(loaded, IdentityFirstStage)
    assert loaded.latent_channels == 2
    with pytest.raises(DataError, match=r"images: expected \[B, 2, H, W\], got \[1, 3, 4, 4\]"):
        stage.encode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="latent_channels: expected at least 1"):
        IdentityFirstStage(0)


def test_a_diffusion_model_of_pixels_is_saved_and_samples_the_same(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        add_attention=False,
    )  # fmt: skip
    model = LatentDiffusion(IdentityFirstStage(), unet, DDIMScheduler(clip_sample=False))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model.decode(model.encode(images)), images)
    samples = model.sample(2, num_inference_steps=2, seeds=0)
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample(2, num_inference_steps=2, seeds=0), samples)
