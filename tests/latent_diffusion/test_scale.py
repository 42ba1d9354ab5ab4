"""The scale between the first stage's latents and z."""

from __future__ import annotations

import pytest
import torch

from fastldm import LatentDiffusion
from fastldm.configuration import FrozenConfig
from fastldm.errors import ConfigError, DataError
from fastldm.latent_diffusion import LatentScale


def test_one_factor_gives_standard_deviation_one() -> None:
    raw = 3 * torch.randn(5, 3, 4, 4) + 2
    scale = LatentScale.calibrated(raw)
    assert scale.factor == pytest.approx(1 / float(raw.double().std()), rel=1e-12)
    z = scale.apply(raw)
    torch.testing.assert_close(z.std(), torch.ones(()), rtol=1e-5, atol=0)
    torch.testing.assert_close(z, raw * scale.factor)
    torch.testing.assert_close(scale.invert(z), raw)


def test_each_channel_gets_mean_zero_and_standard_deviation_one() -> None:
    raw = torch.randn(50, 3, 4, 4) * torch.tensor([0.1, 1, 9]).view(3, 1, 1) + 4
    scale = LatentScale.calibrated(raw, per_channel=True)
    z = scale.apply(raw)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(scale.invert(z), raw, rtol=1e-5, atol=1e-5)


def test_shift_and_mean_are_read_as_diffusers_does() -> None:
    raw = torch.randn(2, 2, 1, 1)
    config = FrozenConfig({"scaling_factor": 0.5, "shift_factor": 0.25})
    torch.testing.assert_close(LatentScale.of(2, config).apply(raw), (raw - 0.25) * 0.5)
    config = FrozenConfig({"scaling_factor": 0.5, "latents_mean": [1, 2], "latents_std": [3, 4]})
    mean, std = torch.tensor([[1.0], [2]]).view(2, 1, 1), torch.tensor([3.0, 4]).view(2, 1, 1)
    torch.testing.assert_close(LatentScale.of(2, config).apply(raw), (raw - mean) * 0.5 / std)
    overridden = LatentScale.of(2, config, 2.0, [0, 0], [1, 1])
    torch.testing.assert_close(overridden.apply(raw), 2 * raw)


def test_calibration_keeps_the_first_stages_config_in_step(build) -> None:
    model = build.model()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    torch.manual_seed(1)
    model.calibrate_scale(images=images)
    torch.manual_seed(1)
    torch.testing.assert_close(model.encode(images).std(), torch.ones(()))
    assert model.first_stage.config.scaling_factor == model.latent_scale.factor
    assert model.first_stage.config.latents_mean is None
    model.calibrate_scale(torch.randn(9, 3, 4, 4), per_channel=True)
    assert model.first_stage.config.latents_mean == list(model.latent_scale.mean)
    assert model.first_stage.config.latents_std == list(model.latent_scale.std)
    assert model.first_stage.config.scaling_factor == 1.0


def test_a_diffusers_autoencoder_is_kept_in_step_too(build) -> None:
    import diffusers

    own = build.first_stage()
    fields = {
        name: own.config[name]
        for name in ("block_out_channels", "down_block_types", "up_block_types",
                     "layers_per_block", "norm_num_groups", "latent_channels", "sample_size")
    }  # fmt: skip
    theirs = diffusers.AutoencoderKL(**fields)
    model = LatentDiffusion(theirs, build.unet(), build.scheduler())
    model.calibrate_scale(2 * torch.randn(4, 3, 4, 4))
    assert theirs.config.scaling_factor == model.latent_scale.factor
    assert model.decode(torch.randn(1, 3, 4, 4)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_useless_latents_are_refused(build, value: float) -> None:
    model = build.model()
    before = model.latent_scale
    with pytest.raises(DataError, match="standard deviation is"):
        model.calibrate_scale(torch.full((2, 3, 4, 4), value))
    assert model.latent_scale == before


def test_bad_values_are_named(build) -> None:
    model = build.model()
    with pytest.raises(DataError, match="latents, images: give one"):
        model.calibrate_scale()
    with pytest.raises(DataError, match=r"z: expected \[B, 3, h, w\], got \[1, 4, 2, 2\]"):
        model.calibrate_scale(torch.randn(1, 4, 2, 2))
    with pytest.raises(ConfigError, match=r"scaling_factor: got 0\.0"):
        LatentScale(3, 0.0)
    with pytest.raises(ConfigError, match="give both or neither"):
        LatentScale(3, 1.0, mean=(0.0, 0.0, 0.0))
    with pytest.raises(ConfigError, match=r"latent_std: got .*; accepted: 2 finite numbers, above"):
        LatentScale(2, 1.0, (0.0, 0.0), (1.0, 0.0))
    with pytest.raises(ConfigError, match=r"latent_mean: got .*; accepted: 3 finite numbers$"):
        LatentScale(3, 1.0, (0.0, 0.0), (1.0, 1.0))
