"""Activations and GroupNorm with one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation as their_activation

from fastldm.errors import ConfigError
from fastldm.modules.activations import get_activation, group_norm


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "mish", "relu", "SiLU"])
def test_activations_are_diffusers(name):
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(get_activation(name)(x), their_activation(name)(x))


@pytest.mark.parametrize("name", ["sine", "", None])
def test_an_unknown_activation_is_named(name):
    with pytest.raises(ConfigError, match="act_fn"):
        get_activation(name)


@pytest.mark.parametrize("name", [None, "silu", "gelu"])
def test_norm_then_activation(name):
    torch.manual_seed(0)
    norm = group_norm(6, 3, 1e-4).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    add = torch.randn(2, 6, dtype=torch.float64)
    activation = None if name is None else get_activation(name)
    expected = F.group_norm(x + add[:, :, None, None], 3, norm.weight, norm.bias, 1e-4)
    expected = expected if activation is None else activation(expected)
    given = norm(x, activation, channel_add=add)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
