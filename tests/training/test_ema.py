"""The moving average against its formula in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fastldm.training.ema import ExponentialMovingAverage


def test_average_is_the_formula_with_its_warm_up() -> None:
    """LitEma: num_updates goes up first; shadow −= (1 − decay)·(shadow − parameter)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = ExponentialMovingAverage(model, 0.7)
    shadow = model.weight.detach().numpy().copy()
    for num_updates in range(1, 60):
        with torch.no_grad():
            model.weight.normal_()
        ema.update_parameters(model)
        decay = min(0.7, (1 + num_updates) / (10 + num_updates))
        shadow -= (1 - decay) * (shadow - model.weight.detach().numpy())
        np.testing.assert_allclose(ema.module.weight.numpy(), shadow, rtol=1e-12, atol=1e-13)


def test_it_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    first, second = (ExponentialMovingAverage(model, 0.9) for _ in range(2))
    for ema in (first, first, second):
        if ema is second:
            second.load_state_dict(first.state_dict())
        nn.init.normal_(model.weight)
        ema.update_parameters(model)
    first.update_parameters(model)
    assert torch.equal(first.module.weight, second.module.weight)


def test_buffers_are_copied_and_nothing_needs_gradients() -> None:
    model = nn.BatchNorm1d(3)
    ema = ExponentialMovingAverage(model, 0.9)
    model(torch.randn(8, 3))
    ema.update_parameters(model)
    assert torch.equal(ema.module.running_mean, model.running_mean)
    assert ema.module.num_batches_tracked == 1
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not ema.module.training
