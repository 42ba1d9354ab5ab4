"""FreeU against diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import apply_freeu

from fastldm.modules.freeu import FreeU, scale_low_frequencies


@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (1, 5, 7, 12), (1, 4, 2, 3), (1, 2, 1, 1)])
def test_both_inputs_are_diffusers(shape):
    hidden_states, skipped = torch.randn(shape), torch.randn(shape)
    expected = apply_freeu(0, hidden_states.clone(), skipped, s1=0.3, b1=1.7, s2=9.0, b2=9.0)
    given = FreeU(backbone=1.7, skip=0.3)(hidden_states, skipped)
    for value, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_inputs_stay_as_they_are():
    hidden_states, skipped = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    before = hidden_states.clone(), skipped.clone()
    FreeU(1.5, 0.2)(hidden_states, skipped)
    assert torch.equal(hidden_states, before[0])
    assert torch.equal(skipped, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_factor_of_one_changes_nothing_and_zero_removes_the_mean(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    kept = scale_low_frequencies(x, 1.0)
    assert kept.dtype == dtype
    torch.testing.assert_close(kept, x)
    mean = scale_low_frequencies(x, 0.0).double().mean(dim=(-2, -1))
    assert mean.abs().max() < (1e-12 if dtype == torch.float64 else 1e-2)
