"""Adversarial losses and the adaptive weight against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastldm.errors import TrainingError
from fastldm.losses.adversarial import (
    adaptive_weight,
    adopt_weight,
    hinge_discriminator_loss,
    linear_generator_loss,
    non_saturating_generator_loss,
    value_and_gradient,
    vanilla_discriminator_loss,
    with_gradient,
)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 5, 4)
    real = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    fake = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    return real, fake


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_hinge(logits: tuple[Tensor, Tensor]) -> None:
    real, fake = (x.numpy() for x in logits)
    expected = np.maximum(0, 1 - real).mean() / 2 + np.maximum(0, 1 + fake).mean() / 2
    assert hinge_discriminator_loss(*logits).item() == pytest.approx(expected, rel=1e-12)


def test_vanilla(logits: tuple[Tensor, Tensor]) -> None:
    real, fake = (x.numpy() for x in logits)
    expected = -(np.log(_sigmoid(real)).mean() + np.log(1 - _sigmoid(fake)).mean()) / 2
    assert vanilla_discriminator_loss(*logits).item() == pytest.approx(expected, rel=1e-12)


def test_generator_sides(logits: tuple[Tensor, Tensor]) -> None:
    fake = logits[1].numpy()
    linear, non_saturating = -fake.mean(), -np.log(_sigmoid(fake)).mean()
    assert linear_generator_loss(logits[1]).item() == pytest.approx(linear, rel=1e-12)
    assert non_saturating_generator_loss(logits[1]).item() == pytest.approx(
        non_saturating, rel=1e-12
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: hinge_discriminator_loss(x, -x),
        lambda x: vanilla_discriminator_loss(x, -x),
        non_saturating_generator_loss,
    ],
)
def test_a_confident_discriminator_stays_finite(loss) -> None:
    assert loss(torch.full((4,), -1e4)).item() == pytest.approx(1e4, rel=1e-3)
    assert loss(torch.full((4,), 1e4)).item() == pytest.approx(0.0, abs=1e-6)


def test_adopt_weight_starts_at_its_threshold() -> None:
    assert [adopt_weight(0.7, step, 2) for step in (0, 1, 2, 3)] == [0.0, 0.0, 0.7, 0.7]
    assert adopt_weight(0.7, 1, 2, value=0.1) == 0.1


def test_with_gradient_has_the_given_value_and_gradient() -> None:
    x, gradient = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    scalar = with_gradient(torch.tensor(5.0), x, gradient)
    upstream = torch.randn(())
    (found,) = torch.autograd.grad(scalar, x, upstream)
    assert scalar.item() == 5.0
    torch.testing.assert_close(found, upstream * gradient, rtol=0, atol=0)


def test_value_and_gradient_is_autograd_and_touches_no_parameter() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def function(y: Tensor) -> tuple[Tensor, Tensor]:
        out = network(y)
        return out.square().mean(), out.mean()

    value, report, gradient = value_and_gradient(function, x)
    expected_value, expected_report = function(x)
    (expected,) = torch.autograd.grad(expected_value, x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert (value.item(), report.item()) == (expected_value.item(), expected_report.item())
    assert x.grad is None
    assert all(parameter.grad is None for parameter in network.parameters())


def test_small_gradients_survive_a_half_precision_network() -> None:
    x = torch.randn(1, 1, 100, 100)

    def function(y: Tensor) -> tuple[Tensor, Tensor]:
        value = (y.half() * 1e-4).float().mean()
        return value, value

    leaf = x.clone().requires_grad_()
    (flushed,) = torch.autograd.grad(function(leaf)[0], leaf)
    _, _, gradient = value_and_gradient(function, x)
    assert (flushed == 0).all()
    torch.testing.assert_close(gradient, torch.full_like(x, 1e-8), rtol=2e-2, atol=0)


class _Case:
    """A last layer, what it made, and two upstream gradients; the weight by hand in float64."""

    def __init__(self, dtype: torch.dtype, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(2, 6, 8, 8, generator=generator)
        weight = torch.randn(3, 6, 1, 1, generator=generator) * 0.3
        self.rec, self.adv = torch.randn(2, 2, 3, 8, 8, generator=generator) * scale
        self.adv = self.adv * 0.03
        self.last_layer = weight.to(dtype).requires_grad_()
        self.image = nn.functional.conv2d(self.hidden.to(dtype), self.last_layer)
        if dtype != torch.float64:
            self.image = self.image.float()

    def norms(self) -> tuple[float, float]:
        rec, adv = (
            torch.einsum("bohw,bihw->oi", x.double(), self.hidden.double()).norm().item()
            for x in (self.rec, self.adv)
        )
        return rec, adv


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adaptive_weight_is_the_ratio_of_gradient_norms(
    dtype: torch.dtype, tolerance: float
) -> None:
    case = _Case(dtype)
    rec, adv = case.norms()
    found = adaptive_weight(
        case.image, case.last_layer, case.rec.to(case.image.dtype), case.adv.to(case.image.dtype)
    )
    assert found.grad_norm_rec.item() == pytest.approx(rec, rel=tolerance)
    assert found.grad_norm_adv.item() == pytest.approx(adv, rel=tolerance)
    assert found.weight.item() == pytest.approx(rec / (adv + 1e-4), rel=tolerance)
    assert bool(found.finite)
    assert case.last_layer.grad is None
    case.image.square().mean().backward()


def test_gradients_too_small_for_half_precision_are_not_lost() -> None:
    case = _Case(torch.float16, scale=1e-9)
    assert torch.equal(case.rec.half(), torch.zeros_like(case.rec.half()))
    rec, adv = case.norms()
    found = adaptive_weight(case.image, case.last_layer, case.rec, case.adv)
    assert found.grad_norm_rec.item() == pytest.approx(rec, rel=5e-3)
    assert found.grad_norm_adv.item() == pytest.approx(adv, rel=5e-3)


def test_gradients_too_large_for_half_precision_do_not_overflow() -> None:
    case = _Case(torch.float16, scale=1e6)
    rec, adv = case.norms()
    found = adaptive_weight(case.image, case.last_layer, case.rec, case.adv)
    assert found.grad_norm_rec.item() == pytest.approx(rec, rel=5e-3)
    assert found.weight.item() == pytest.approx(rec / (adv + 1e-4), rel=5e-3)


def test_no_adversarial_gradient_gives_the_largest_weight() -> None:
    case = _Case(torch.float64, scale=1e3)
    found = adaptive_weight(case.image, case.last_layer, case.rec, torch.zeros_like(case.adv))
    assert found.weight.item() == 1e4
    assert bool(found.finite)


def test_no_reconstruction_gradient_gives_zero() -> None:
    case = _Case(torch.float64)
    found = adaptive_weight(case.image, case.last_layer, torch.zeros_like(case.rec), case.adv)
    assert found.weight.item() == 0.0
    assert bool(found.finite)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["rec", "adv"])
def test_non_finite_gradients_give_zero_and_say_so(bad: float, which: str) -> None:
    case = _Case(torch.float32)
    getattr(case, which)[0, 0, 0, 0] = bad
    found = adaptive_weight(case.image, case.last_layer, case.rec, case.adv)
    assert found.weight.item() == 0.0
    assert not bool(found.finite)


def test_a_layer_outside_the_graph_is_named() -> None:
    case = _Case(torch.float32)
    for layer in (torch.randn(3, requires_grad=True), case.last_layer.detach()):
        with pytest.raises(TrainingError, match=r"last_layer: .*model\.last_layer"):
            adaptive_weight(case.image, layer, case.rec, case.adv)
