"""Upsample2D and Downsample2D against diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.downsampling import Downsample2D as TheirDownsample
from diffusers.models.upsampling import Upsample2D as TheirUpsample

from fastldm.errors import ConfigError
from fastldm.modules.sampling import Downsample2D, Upsample2D


def assert_equal_results(ours, theirs, x, **kwargs) -> torch.Tensor:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    given = ours.double()(x, **kwargs)
    torch.testing.assert_close(given, theirs.double()(x, **kwargs), rtol=1e-12, atol=1e-12)
    return given


@pytest.mark.parametrize("use_conv", [False, True])
@pytest.mark.parametrize("output_size", [None, (9, 13)])
def test_upsampling_is_diffusers(use_conv, output_size):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    out_channels = 6 if use_conv else None
    ours = Upsample2D(4, use_conv=use_conv, out_channels=out_channels)
    theirs = TheirUpsample(4, use_conv=use_conv, out_channels=out_channels)
    given = assert_equal_results(ours, theirs, x, output_size=output_size)
    assert given.shape[2:] == (output_size or (10, 14))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_strided_convolution_is_diffusers(padding, size):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    ours = Downsample2D(4, use_conv=True, out_channels=6, padding=padding)
    theirs = TheirDownsample(4, use_conv=True, out_channels=6, padding=padding, name="op")
    assert_equal_results(ours, theirs, x)


def test_pooling_is_diffusers():
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    given = assert_equal_results(Downsample2D(4), TheirDownsample(4, name="op"), x)
    assert given.shape == (2, 4, 3, 3)


@pytest.mark.parametrize("module", [Upsample2D, Downsample2D])
def test_new_channels_need_a_convolution(module):
    with pytest.raises(ConfigError, match="keeps 4 channels, got 6"):
        module(4, out_channels=6)
