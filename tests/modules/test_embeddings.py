"""Embeddings against their formulas in float64, and against diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models import embeddings as theirs

from fastldm.errors import ConfigError
from fastldm.modules import embeddings as ours


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("width", "shift", "scale"), [(8, 0, 1), (9, 1, 1), (32, 1, 0.5)])
def test_timestep_embedding_is_the_formula(
    flip: bool, width: int, shift: int, scale: float
) -> None:
    timesteps = torch.tensor([0.0, 1.0, 17.5, 999.0])
    half = width // 2
    expected = torch.zeros(len(timesteps), width, dtype=torch.float64)
    for row, timestep in enumerate(timesteps.tolist()):
        for i in range(half):
            phase = scale * timestep * 10000 ** (-i / (half - shift))
            sine, cosine = (half + i, i) if flip else (i, half + i)
            expected[row, sine] = math.sin(phase)
            expected[row, cosine] = math.cos(phase)
    actual = ours.get_timestep_embedding(timesteps, width, flip, shift, scale)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
    module = ours.Timesteps(width, flip, shift, scale)
    assert torch.equal(module(timesteps), actual)


def test_timestep_embedding_has_the_bits_that_models_were_trained_on() -> None:
    timesteps = torch.arange(1000)
    actual = ours.get_timestep_embedding(timesteps, 320, True, 0)
    assert torch.equal(actual, theirs.get_timestep_embedding(timesteps, 320, True, 0))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_fourier_projection(log: bool, flip: bool) -> None:
    module = ours.GaussianFourierProjection(5, scale=2.0, log=log, flip_sin_to_cos=flip)
    assert not module.weight.requires_grad
    x = torch.tensor([0.3, 11.0])
    phases = 2 * math.pi * (x.log() if log else x).double()[:, None] * module.weight.double()
    halves = [phases.cos(), phases.sin()] if flip else [phases.sin(), phases.cos()]
    torch.testing.assert_close(module(x).double(), torch.cat(halves, 1), rtol=0, atol=1e-4)


def test_fourier_frequencies_have_the_scale() -> None:
    torch.manual_seed(0)
    assert ours.GaussianFourierProjection(4000, scale=16).weight.std() == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"act_fn": "gelu", "post_act_fn": "mish"}, {"cond_proj_dim": 3}],
    ids=str,
)
def test_timestep_embedding_module_against_diffusers(options: dict[str, Any]) -> None:
    reference = theirs.TimestepEmbedding(6, 10, **options)
    module = ours.TimestepEmbedding(6, 10, **options)
    module.load_state_dict(reference.state_dict())
    condition = torch.randn(2, 3) if "cond_proj_dim" in options else None
    x = torch.randn(2, 6)
    torch.testing.assert_close(module(x, condition), reference(x, condition))


def test_condition_without_a_projection_for_it() -> None:
    with pytest.raises(ConfigError, match="time_cond_proj_dim"):
        ours.TimestepEmbedding(6, 10)(torch.zeros(2, 6), torch.zeros(2, 3))


def test_pooled_text_against_diffusers() -> None:
    torch.manual_seed(0)
    reference = theirs.TextTimeEmbedding(12, 10, num_heads=3)
    module = ours.TextTimeEmbedding(12, 10, num_heads=3)
    module.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-5, atol=1e-6)


def test_heads_that_do_not_divide_the_text() -> None:
    with pytest.raises(ConfigError, match=r"addition_embed_type_num_heads: 5 heads .* 12"):
        ours.TextTimeEmbedding(12, 10, num_heads=5)
