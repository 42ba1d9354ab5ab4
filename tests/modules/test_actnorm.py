"""ActNorm: initialisation from data, inverse, log-determinant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastldm.errors import TrainingError
from fastldm.modules.actnorm import ActNorm


def batch(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64)
    spread = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64).view(1, 3, 1, 1)
    return (x * spread + 4 * spread).to(dtype)


def test_the_first_batch_is_whitened_and_the_second_is_not() -> None:
    layer, x = ActNorm(3).double(), batch()
    y = layer(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        y.transpose(0, 1).flatten(1).std(1), torch.ones(3).double(), rtol=2e-5, atol=0
    )
    torch.testing.assert_close(layer.loc.flatten(), -x.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer(x * 2 + 1), layer.scale * (x * 2 + 1 + layer.loc))
    assert layer.initialized.item() == 1


def test_parameters_are_tamings_and_trainable() -> None:
    layer = ActNorm(3)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "loc": (1, 3, 1, 1),
        "scale": (1, 3, 1, 1),
        "initialized": (),
    }
    assert layer.initialized.dtype == torch.uint8
    x, upstream = batch(torch.float32), torch.randn(4, 3, 5, 6)
    layer(x).backward(upstream)
    torch.testing.assert_close(
        layer.scale.grad.flatten(), (upstream * (x + layer.loc)).sum((0, 2, 3)).detach()
    )


def test_reverse_undoes_forward() -> None:
    layer, x = ActNorm(3).double(), batch()
    torch.testing.assert_close(layer.reverse(layer(x)), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(layer(x), reverse=True), x, rtol=1e-10, atol=1e-10)


def test_logdet_is_that_of_the_jacobian() -> None:
    layer = ActNorm(2, logdet=True).double()
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64)
    _, log_det = layer(x)
    jacobian = torch.autograd.functional.jacobian(lambda z: layer(z[None])[0], x[0])
    expected = torch.linalg.slogdet(jacobian.reshape(12, 12)).logabsdet
    torch.testing.assert_close(log_det, expected.expand(3), rtol=1e-10, atol=0)


def test_vectors_are_normalised_too() -> None:
    layer = ActNorm(5, logdet=True).double()
    x = torch.randn(64, 5, dtype=torch.float64) * 7 + 2
    y, log_det = layer(x)
    torch.testing.assert_close(y.std(0), torch.ones(5).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.reverse(y), x)
    torch.testing.assert_close(log_det[0], layer.scale.abs().log().sum())


def test_half_precision_batches_are_measured_in_float32() -> None:
    layer = ActNorm(3)
    x = batch().bfloat16()
    layer(x)
    expected = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.loc.flatten().double(), -expected.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        layer.scale.flatten().double(), 1 / expected.std(1), rtol=1e-4, atol=0
    )


def test_a_single_value_and_a_constant_channel_stay_finite() -> None:
    for shape in ((1, 2, 1, 1), (4, 2, 3, 3)):
        layer = ActNorm(2)
        assert layer(torch.full(shape, 3.0)).isfinite().all()
        assert layer.scale.isfinite().all()


def test_uninitialised_use_is_refused() -> None:
    layer = ActNorm(3)
    with pytest.raises(TrainingError, match="before reverse"):
        layer.reverse(batch(torch.float32))
    with pytest.raises(TrainingError, match=r"not initialised.*before eval\(\)"):
        layer.eval()(batch(torch.float32))
    with pytest.raises(TrainingError, match="not initialised"):
        ActNorm(3, allow_reverse_init=True).eval().reverse(batch(torch.float32))


def test_reverse_may_initialise_where_allowed() -> None:
    layer = ActNorm(3, allow_reverse_init=True).double()
    layer.reverse(batch())
    torch.testing.assert_close(layer.loc.flatten(), -batch().mean((0, 2, 3)))


def test_loaded_state_replaces_initialisation() -> None:
    trained, x = ActNorm(3).double(), batch()
    trained(x)
    fresh = ActNorm(3).double()
    fresh.load_state_dict(trained.state_dict())
    fresh.eval()
    torch.testing.assert_close(fresh(x * 3), trained(x * 3), rtol=0, atol=0)
    untrained = ActNorm(3).double().state_dict()
    fresh.load_state_dict(untrained)
    with pytest.raises(TrainingError, match="not initialised"):
        fresh(x)


def test_copies_keep_their_state() -> None:
    layer, x = ActNorm(3).double(), batch()
    layer(x)
    twin = copy.deepcopy(nn.Sequential(layer)).eval()
    torch.testing.assert_close(twin(x * 2), layer(x * 2), rtol=0, atol=0)
