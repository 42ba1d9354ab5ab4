"""The diffusion loss against float64 formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.losses import DiffusionLossConfig
from fastldm.losses.diffusion import DiffusionLoss, min_snr_weights
from fastldm.losses.gaussian_diffusion import vlb_weights

T = 50
TYPES = ["epsilon", "sample", "v_prediction"]


def schedule() -> torch.Tensor:
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, T, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    output, x0, noise = torch.randn(3, 6, 3, 4, 5, generator=g, dtype=torch.float64)
    return output, x0, noise, torch.tensor([0, 1, 7, 30, 48, 49])


def weights_by_hand(kind: str, v: float) -> list[float]:
    """2006.11239, eq. 12, for one time step after the other."""
    bars = schedule().tolist()
    weights = []
    for t in range(1, T):
        bar, previous = bars[t], bars[t - 1]
        alpha = bar / previous
        beta = 1 - alpha
        sigma2 = (1 - v) * beta * (1 - previous) / (1 - bar) + v * beta
        # ½σ⁻²·‖μ̃ − μ‖² with μ̃ − μ = √ᾱ_prev·β/(1−ᾱ)·(x₀ − x̂₀)
        of_x0 = previous * beta**2 / (2 * sigma2 * (1 - bar) ** 2)
        weights.append(
            {
                "epsilon": of_x0 * (1 - bar) / bar,
                "sample": 0.5 * math.sqrt(bar) / (2.0 * 1 - bar),
                "v_prediction": of_x0 * (1 - bar),
            }[kind]
        )
    return [weights[0], *weights]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("v", [0.0, 0.3])
def test_vlb_weights(kind: str, v: float) -> None:
    expected = torch.tensor(weights_by_hand(kind, v), dtype=torch.float64)
    torch.testing.assert_close(vlb_weights(schedule(), kind, v), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_weighs_the_error_of_x0(kind: str) -> None:
    """Whatever is predicted, its squared error times the weight is min(SNR, γ)·‖x₀ − x̂₀‖²."""
    bar = schedule()
    snr = bar / (1 - bar)
    of_x0 = {"epsilon": (1 - bar) / bar, "sample": torch.ones(T), "v_prediction": 1 - bar}[kind]
    expected = snr.clamp(max=5.0) * of_x0
    torch.testing.assert_close(min_snr_weights(bar, kind, 5.0), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_targets(kind: str, batch: tuple[torch.Tensor, ...]) -> None:
    _, x0, noise, t = batch
    bar = schedule()[t].view(-1, 1, 1, 1)
    v = bar.sqrt() * noise - (1 - bar).sqrt() * x0
    expected = {"epsilon": noise, "sample": x0, "v_prediction": v}[kind]
    loss = DiffusionLoss(DiffusionLossConfig(), schedule(), kind)
    torch.testing.assert_close(loss.target(x0, noise, t), expected, rtol=1e-12, atol=1e-12)


def errors_by_hand(loss_type: str, difference: torch.Tensor) -> torch.Tensor:
    size = difference.abs()
    values = {
        "l1": size,
        "l2": size**2,
        "huber": torch.where(size <= 0.5, size**2 / 2, 0.5 * (size - 0.25)),
    }[loss_type]
    return torch.stack([sample.sum() / sample.numel() for sample in values])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_term(kind, loss_type, dtype, batch) -> None:
    output, x0, _, t = batch
    config = DiffusionLossConfig(
        loss_type=loss_type,
        huber_delta=0.5,
        l_simple_weight=0.7,
        original_elbo_weight=0.2,
        learn_logvar=True,
        logvar_init=0.4,
        snr_gamma=5.0,
    )
    loss = DiffusionLoss(config, schedule(), kind).to(dtype)
    with torch.no_grad():
        loss.logvar.copy_(torch.linspace(-1, 1, T, dtype=torch.float64))
    output = output.clone().requires_grad_()
    errors = errors_by_hand(loss_type, output - x0)
    logvar = torch.linspace(-1, 1, T, dtype=torch.float64)[t]
    snr = min_snr_weights(schedule(), kind, 5.0)[t]
    gamma = (snr * errors / logvar.exp() + logvar).mean()
    vlb = (vlb_weights(schedule(), kind)[t] * errors).mean()
    expected = 0.7 * gamma + 0.2 * vlb
    (expected_gradient,) = torch.autograd.grad(expected, output)

    given = output.detach().to(dtype).requires_grad_()
    total, logs = loss(given, x0.to(dtype), t)
    (gradient,) = torch.autograd.grad(total, given)
    tolerance = (
        {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    )
    values = {
        "loss": expected,
        "loss_simple": errors.mean(),
        "loss_vlb": vlb,
        "loss_gamma": gamma,
        "logvar": torch.zeros(()),
    }
    assert logs.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(logs[name].double(), value.detach().double(), **tolerance)
        assert not logs[name].requires_grad
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


def test_logvar_learns_the_logarithm_of_the_error(batch) -> None:
    output, x0, _, t = batch
    loss = DiffusionLoss(DiffusionLossConfig(learn_logvar=True), schedule())
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss(output, x0, t)[0].backward()
        optimizer.step()
    errors = errors_by_hand("l2", output - x0).float()
    torch.testing.assert_close(loss.logvar[t], errors.log(), rtol=1e-4, atol=1e-4)
    untouched = torch.ones(T, dtype=torch.bool)
    untouched[t] = False
    assert (loss.logvar[untouched] == 0).all()


def test_a_fixed_logvar_is_a_constant_and_not_saved(batch) -> None:
    output, x0, _, t = batch
    plain = DiffusionLoss(DiffusionLossConfig(), schedule())
    fixed = DiffusionLoss(DiffusionLossConfig(logvar_init=0.5), schedule())
    assert not list(fixed.parameters())
    assert not fixed.state_dict()
    expected = plain(output, x0, t)[0] * math.exp(-0.5) + 0.5
    torch.testing.assert_close(fixed(output, x0, t)[0], expected)
    assert set(plain(output, x0, t)[1]) == {"loss", "loss_simple", "loss_vlb"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, batch) -> None:
    output, x0, _, t = batch
    output = (300 * output).to(dtype)
    loss = DiffusionLoss(DiffusionLossConfig(), schedule())
    expected = (output.double() - x0.float().double()).square().flatten(1).mean(1).mean()
    with torch.autocast("cpu", torch.bfloat16):
        total, logs = loss(output, x0.float(), t)
    assert total.dtype == logs["loss_simple"].dtype == torch.float32
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)


def test_zero_terminal_snr(batch) -> None:
    output, x0, noise, t = batch
    bar = schedule()
    bar[-1] = 0
    for kind in ("sample", "v_prediction"):
        weighted = DiffusionLoss(
            DiffusionLossConfig(snr_gamma=5.0, original_elbo_weight=0.1), bar, kind
        )
        total, logs = weighted(output, weighted.target(x0, noise, t), t)
        assert total.isfinite()
        assert all(value.isfinite() for value in logs.values())
    assert DiffusionLoss(DiffusionLossConfig(snr_gamma=5.0), bar)(output, noise, t)[0].isfinite()
    with pytest.raises(ConfigError, match="original_elbo_weight: the bound is infinite"):
        DiffusionLoss(DiffusionLossConfig(original_elbo_weight=0.1), bar)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_type", "l3"),
        ("huber_delta", 0),
        ("l_simple_weight", -1.0),
        ("original_elbo_weight", math.nan),
        ("v_posterior", 1.5),
        ("logvar_init", "0"),
        ("snr_gamma", 0.0),
        ("snr_gamma", True),
    ],
)
def test_bad_fields_are_named(field, value) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: expected"):
        DiffusionLossConfig(**{field: value})


def test_bad_prediction_type_is_named() -> None:
    with pytest.raises(ConfigError, match=r"prediction_type: expected .*, got 'flow'"):
        DiffusionLoss(DiffusionLossConfig(), schedule(), "flow")
