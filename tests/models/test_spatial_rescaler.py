"""SpatialRescaler: sizes, numbers, config and errors."""

from __future__ import annotations

import pytest
import torch

from fastldm.errors import ConfigError, DataError
from fastldm.models import SpatialRescaler


def test_bilinear_halving_averages_blocks_then_maps_the_channels() -> None:
    torch.manual_seed(0)
    model = SpatialRescaler(num_stages=2, in_channels=5, out_channels=3).double()
    condition = torch.randn(2, 5, 8, 12, dtype=torch.float64)
    blocks = condition.unflatten(3, (3, 4)).unflatten(2, (2, 4)).mean(dim=(3, 5))
    expected = torch.einsum("oc,bchw->bohw", model.channel_mapper.weight[:, :, 0, 0], blocks)
    torch.testing.assert_close(model(condition), expected, rtol=1e-12, atol=1e-12)
    assert model.num_parameters() == 15


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "area"])
def test_every_method_scales_constants_and_sizes(method: str) -> None:
    model = SpatialRescaler(num_stages=1, method=method, multiplier=0.25, in_channels=2)
    assert model(torch.ones(1, 2, 8, 16)).shape == (1, 2, 2, 4)
    assert torch.equal(model(torch.ones(1, 2, 8, 16)), torch.ones(1, 2, 2, 4))
    assert model.channel_mapper is None


def test_saved_and_loaded(tmp_path) -> None:
    model = SpatialRescaler(num_stages=1, in_channels=4, out_channels=2, bias=True)
    model.save_pretrained(tmp_path)
    loaded = SpatialRescaler.from_pretrained(tmp_path)
    condition = torch.randn(1, 4, 6, 6)
    assert torch.equal(loaded(condition), model(condition))
    assert loaded.config == model.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "trilinear"}, "method: .*'trilinear'"),
        ({"num_stages": -1}, "num_stages: .*-1"),
        ({"multiplier": 0}, "multiplier: .*0"),
        ({"in_channels": 0}, "in_channels: .*0"),
        ({"out_channels": 0}, "out_channels: .*0"),
    ],
)
def test_config_errors_name_the_field(fields, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpatialRescaler(**fields)


def test_a_condition_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"condition: expected \[B, 3, H, W\], got \[1, 2, 4, 4\]"):
        SpatialRescaler()(torch.zeros(1, 2, 4, 4))
