"""Tiling and slicing of both autoencoders."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastldm.models import AutoencoderKL, VQModel

CONFIG = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "sample_size": 32,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**CONFIG).eval()
    theirs.save_pretrained(folder)
    return theirs, AutoencoderKL.from_pretrained(folder)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (40, 88), (100, 72)])
@torch.no_grad()
def test_tiled_results_are_diffusers_tiled_results(models, size):
    theirs, ours = models
    x, z = images(2, 3, *size), images(2, 4, size[0] // 4, size[1] // 4)
    whole = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    for model in models:
        model.enable_tiling()
    try:
        given = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
        expected = theirs.encode(x).latent_dist.parameters, theirs.decode(z).sample
    finally:
        for model in models:
            model.disable_tiling()
    for tiled, reference, untiled in zip(given, expected, whole, strict=True):
        assert relative_error(tiled, reference) < 1e-5
        assert tiled.shape == untiled.shape
        assert torch.equal(tiled, untiled) == (max(size) <= 32)


def test_tiles_whose_sizes_do_not_divide_evenly_are_as_in_diffusers(models):
    theirs, ours = models
    z = images(1, 4, 17, 9)
    expected_sizes = (ours.tile_sample_min_size, ours.tile_latent_min_size)
    assert expected_sizes == (theirs.tile_sample_min_size, theirs.tile_latent_min_size)
    for model in models:
        model.enable_tiling()
        model.tile_latent_min_size, model.tile_sample_min_size = 6, 24
        model.tile_overlap_factor = 0.34
    try:
        with torch.no_grad():
            assert relative_error(ours.decode(z).sample, theirs.decode(z).sample) < 1e-5
    finally:
        for model in models:
            model.disable_tiling()
            model.tile_sample_min_size, model.tile_latent_min_size = expected_sizes
            model.tile_overlap_factor = 0.25


def test_tiles_without_overlap_meet_at_their_edges(models):
    ours = models[1]
    z = images(1, 4, 16, 8)
    ours.enable_tiling()
    ours.tile_overlap_factor = 0.0
    try:
        with torch.no_grad():
            tiled = ours.decode(z).sample
            ours.disable_tiling()
            halves = [ours.decode(half).sample for half in z.split(8, dim=2)]
    finally:
        ours.disable_tiling()
        ours.tile_overlap_factor = 0.25
    assert relative_error(tiled, torch.cat(halves, dim=2)) < 1e-6


def test_gradients_flow_through_tiles(models):
    ours = models[1]
    z = images(1, 4, 12, 12).requires_grad_()
    ours.enable_tiling()
    try:
        sample = ours.decode(z).sample
    finally:
        ours.disable_tiling()
    (gradient,) = torch.autograd.grad(sample, z, torch.randn_like(sample))
    assert (gradient != 0).all()


@pytest.mark.parametrize("model_class", [AutoencoderKL, VQModel])
@torch.no_grad()
def test_slices_of_a_batch_give_the_same_images(model_class):
    torch.manual_seed(0)
    model = model_class(**CONFIG).eval()
    x = images(3, 3, 16, 16)
    expected = model(x).sample
    batches = []
    model.encoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    model.enable_slicing()
    assert relative_error(model(x).sample, expected) < 1e-5
    assert batches == [1, 1, 1]
    model.disable_slicing()
    assert relative_error(model(x).sample, expected) < 1e-6
    assert batches[3:] == [3]


@torch.no_grad()
def test_a_vq_model_decodes_in_tiles():
    torch.manual_seed(0)
    model = VQModel(**CONFIG).eval()
    x = images(1, 3, 64, 40)
    latents, sample = model.encode(x).latents, model(x).sample
    model.enable_tiling()
    assert model.encode(x).latents.shape == latents.shape
    tiled = model.decode(latents).sample
    assert tiled.shape == sample.shape
    assert not torch.equal(tiled, sample)
    # The first tile is not blended, so its far corner is that of the tile decoded alone.
    z_q = model.quantize(latents).z_q
    model.disable_tiling()
    alone = model.decode(z_q[..., :8, :8], force_not_quantize=True).sample
    assert relative_error(tiled[..., :24, :24], alone[..., :24, :24]) < 1e-6


def test_a_sample_size_of_two_numbers_is_taken_by_its_first():
    model = AutoencoderKL(**{**CONFIG, "sample_size": (64, 32)})
    assert (model.tile_sample_min_size, model.tile_latent_min_size) == (64, 16)
