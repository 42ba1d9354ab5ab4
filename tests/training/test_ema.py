"""The moving average against its formula in float64."""

from __future__ import annotations

import torch
from torch import nn

from fastldm.training.ema import ExponentialMovingAverage


def test_average_is_the_formula_with_its_warm_up() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = ExponentialMovingAverage(model, 0.7)
    expected = model.weight.detach().double().clone()
    for update in range(60):
        with torch.no_grad():
            model.weight.normal_()
        ema.update_parameters(model)
        decay = min(0.7, (1 + update) / (10 + update))
        if update == 0:
            expected = model.weight.detach().double().clone()
        else:
            expected = decay * expected + (1 - decay) * model.weight.detach().double()
        torch.testing.assert_close(ema.module.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_buffers_are_copied_and_nothing_needs_gradients() -> None:
    model = nn.BatchNorm1d(3)
    ema = ExponentialMovingAverage(model, 0.9)
    model(torch.randn(8, 3))
    ema.update_parameters(model)
    assert torch.equal(ema.module.running_mean, model.running_mean)
    assert ema.module.num_batches_tracked == 1
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not ema.module.training
