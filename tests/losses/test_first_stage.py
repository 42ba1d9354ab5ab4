"""The first-stage loss against CompVis's formulas, written out with plain autograd in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError, DataError
from fastldm.losses import FirstStageLoss, FirstStageLossConfig
from fastldm.losses.reconstruction import bernoulli_error

CHANNELS = 3


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(4, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(8, CHANNELS, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(torch.nn.functional.silu(self.body(z)))


def make_discriminator(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 1, 4, 2, 1)
    ).to(dtype)


class Scene:
    """A tiny model, a batch and the terms that the model would hand to the loss."""

    def __init__(self, dtype: torch.dtype = torch.float64, batch: int = 4, size: int = 20) -> None:
        self.decoder, self.discriminator = Decoder().to(dtype), make_discriminator(dtype)
        generator = torch.Generator().manual_seed(2)
        self.images = (torch.rand(batch, CHANNELS, size, size, generator=generator) * 2 - 1).to(
            dtype
        )
        self.z = torch.randn(batch, 4, size, size, generator=generator).to(dtype)
        self.kl = torch.rand(batch, generator=generator).to(dtype).requires_grad_()

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def gradients(self, total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, list(self.decoder.parameters()), retain_graph=True))


def config(**fields) -> FirstStageLossConfig:
    defaults = {"perceptual_weight": 0.0, "discriminator_start": 0}
    return FirstStageLossConfig(**{**defaults, **fields})


def compvis(
    scene: Scene,
    images: Tensor,
    image: Tensor,
    *,
    kl: Tensor | None,
    pixel=lambda x, y: (x - y).abs(),
    sums: bool = True,
    logvar: float = 0.0,
    perceptual=None,
    perceptual_weight: float = 1.0,
    disc_weight: float = 0.5,
    generator_loss=lambda logits: -logits.mean(),
) -> dict[str, Tensor]:
    """LPIPSWithDiscriminator.forward of the generator, with autograd doing all the work."""
    rec = pixel(images, image)
    if perceptual is not None:
        rec = rec + perceptual_weight * perceptual(images, image).view(-1, 1, 1, 1)
    nll = rec / math.exp(logvar) + logvar
    nll = nll.sum() / nll.shape[0] if sums else nll.mean()
    g_loss = generator_loss(scene.discriminator(image))
    nll_gradient, g_gradient = (
        torch.autograd.grad(loss, scene.last_layer, retain_graph=True)[0] for loss in (nll, g_loss)
    )
    ratio = nll_gradient.norm() / (g_gradient.norm() + 1e-4)
    d_weight = ratio.clamp(0.0, 1e4).detach() * disc_weight
    total = nll + d_weight * g_loss
    if kl is not None:
        total = total + 1e-6 * kl.sum() / kl.shape[0]
    return {
        "total": total,
        "nll": nll,
        "g_loss": g_loss,
        "d_weight": d_weight,
        "grad_norm_rec": nll_gradient.norm(),
        "grad_norm_adv": g_gradient.norm(),
    }


def assert_same(scene: Scene, total: Tensor, logs: dict, expected: dict, rtol: float) -> None:
    for name, value in expected.items():
        assert logs[name].item() == pytest.approx(value.item(), rel=rtol), name
    pairs = zip(scene.gradients(total), scene.gradients(expected["total"]), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=rtol * 100, atol=rtol * 10)


def test_kl_loss_is_compvis(squeezenet_weights: Path) -> None:
    scene = Scene()
    loss = FirstStageLoss(
        FirstStageLossConfig.compvis_kl(
            discriminator_start=0,
            logvar_init=0.3,
            perceptual_weight=0.7,
            perceptual_net="squeeze",
            perceptual_weights=str(squeezenet_weights),
        )
    ).double()
    image = scene.decoder(scene.z)
    total, logs = loss.generator_loss(
        scene.images,
        image,
        discriminator=scene.discriminator,
        last_layer=scene.last_layer,
        posterior_kl=scene.kl,
        global_step=0,
    )
    expected = compvis(
        scene,
        scene.images,
        image,
        kl=scene.kl,
        logvar=0.3,
        perceptual=loss.perceptual,
        perceptual_weight=0.7,
    )
    assert expected["d_weight"] > 0
    assert_same(scene, total, logs, expected, 1e-7)  # logvar_init passes through float32
    assert logs["perceptual"].item() == pytest.approx(
        loss.perceptual(scene.images, image).mean().item(), rel=1e-9
    )
    assert logs["rec"].item() == pytest.approx((scene.images - image).abs().mean().item())
    assert logs["kl"].item() == pytest.approx(scene.kl.mean().item())
    (kl_gradient,) = torch.autograd.grad(total, scene.kl)
    torch.testing.assert_close(kl_gradient, torch.full_like(scene.kl, 1e-6 / 4))


@pytest.mark.parametrize("legacy", [True, False])
def test_vq_loss_is_taming(legacy: bool) -> None:
    scene = Scene()
    codebook, commitment = torch.tensor([0.4, 0.9], dtype=torch.float64).unbind()
    codebook.requires_grad_()
    commitment.requires_grad_()
    loss = FirstStageLoss(
        FirstStageLossConfig.compvis_vq(perceptual_weight=0.0, legacy=legacy, codebook_weight=2.0)
    )
    image = scene.decoder(scene.z)
    total, logs = loss.generator_loss(
        scene.images,
        image,
        discriminator=scene.discriminator,
        last_layer=scene.last_layer,
        codebook_loss=codebook,
        commitment_loss=commitment,
        perplexity=torch.tensor(17.0),
        usage=torch.tensor(0.25),
        global_step=0,
    )
    expected = compvis(scene, scene.images, image, kl=None, sums=False, disc_weight=0.75)
    quantiser = commitment + 0.25 * codebook if legacy else codebook + 0.25 * commitment
    expected["total"] = expected["total"] + 2.0 * quantiser
    assert_same(scene, total, logs, expected, 1e-10)
    assert (logs["codebook"].item(), logs["commitment"].item()) == (0.4, 0.9)
    assert (logs["perplexity"].item(), logs["usage"].item()) == (17.0, 0.25)
    weights = torch.autograd.grad(total, [codebook, commitment])
    assert [w.item() for w in weights] == ([0.5, 2.0] if legacy else [2.0, 0.5])


@pytest.mark.parametrize(
    ("kl_given", "reduction", "values"),
    [
        (True, "auto", 3 * 20 * 20),
        (False, "auto", 1),
        (True, "mean", 1),
        (False, "sum_per_sample", 3 * 20 * 20),
    ],
)
@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_reductions(kl_given: bool, reduction: str, values: int, reconstruction: str) -> None:
    scene = Scene()
    loss = FirstStageLoss(
        config(reduction=reduction, reconstruction=reconstruction, discriminator_weight=0.0)
    )
    image = scene.decoder(scene.z)
    _, logs = loss.generator_loss(
        scene.images, image, posterior_kl=scene.kl if kl_given else None, global_step=0
    )
    error = (scene.images - image).abs()
    mean = (error if reconstruction == "l1" else error**2).mean().item()
    assert logs["rec"].item() == pytest.approx(mean, rel=1e-12)
    assert logs["nll"].item() == pytest.approx(mean * values, rel=1e-12)


def test_learned_logvar_gets_its_gradient() -> None:
    scene = Scene()
    loss = FirstStageLoss(
        config(learn_logvar=True, logvar_init=-0.5, discriminator_weight=0.0)
    ).double()
    image = scene.decoder(scene.z)
    total, _ = loss.generator_loss(scene.images, image, posterior_kl=scene.kl, global_step=0)
    (found,) = torch.autograd.grad(total, loss.logvar)
    summed = (scene.images - image).abs().sum().item() / 4
    assert found.item() == pytest.approx(-summed * math.exp(0.5) + 3 * 20 * 20, rel=1e-10)
    assert [name for name, _ in loss.named_parameters()] == ["logvar"]
    assert list(loss.state_dict()) == ["logvar"]
    assert not FirstStageLoss(config()).logvar.requires_grad


def test_vanilla_generator_and_discriminator() -> None:
    scene = Scene()
    non_saturating = lambda logits: -torch.log(torch.sigmoid(logits)).mean()  # noqa: E731
    sides = {"auto": non_saturating, "linear": lambda logits: -logits.mean()}
    for side, function in sides.items():
        loss = FirstStageLoss(config(adversarial_loss="vanilla", generator_loss=side))
        image = scene.decoder(scene.z)
        total, logs = loss(
            scene.images,
            image,
            discriminator=scene.discriminator,
            last_layer=scene.last_layer,
            global_step=0,
        )
        expected = compvis(scene, scene.images, image, kl=None, sums=False, generator_loss=function)
        assert_same(scene, total, logs, expected, 1e-10)
    total, _ = loss.discriminator_loss(
        scene.images, image, discriminator=scene.discriminator, global_step=0
    )
    real, fake = (torch.sigmoid(scene.discriminator(x)) for x in (scene.images, image))
    assert total.item() == pytest.approx(
        -0.5 * (real.log().mean() + (1 - fake).log().mean()).item(), rel=1e-10
    )


def test_discriminator_loss_trains_the_discriminator_alone() -> None:
    scene = Scene()
    loss = FirstStageLoss(config(discriminator_factor=0.8))
    image = scene.decoder(scene.z)
    total, logs = loss.discriminator_loss(
        scene.images, image, discriminator=scene.discriminator, global_step=0
    )
    real, fake = scene.discriminator(scene.images), scene.discriminator(image.detach())
    expected = 0.4 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    parameters = list(scene.discriminator.parameters())
    for found, wanted in zip(
        torch.autograd.grad(total, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    total.backward()
    assert all(parameter.grad is None for parameter in scene.decoder.parameters())
    assert logs["disc_loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert logs["logits_real"].item() == pytest.approx(real.mean().item())
    assert logs["logits_fake"].item() == pytest.approx(fake.mean().item())
    assert logs["disc_factor"].item() == pytest.approx(0.8)


def test_generator_loss_leaves_nothing_in_the_discriminator() -> None:
    scene = Scene()
    total, _ = FirstStageLoss(config()).generator_loss(
        scene.images,
        scene.decoder(scene.z),
        discriminator=scene.discriminator,
        last_layer=scene.last_layer,
        global_step=0,
    )
    total.backward()
    assert all(parameter.grad is None for parameter in scene.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in scene.discriminator.parameters())
    assert all(parameter.grad is not None for parameter in scene.decoder.parameters())


def test_start_step() -> None:
    scene = Scene()
    loss = FirstStageLoss(config(discriminator_start=3, discriminator_factor=0.5))
    totals = {}
    for step in (2, 3):
        image = scene.decoder(scene.z)
        total, logs = loss.generator_loss(
            scene.images,
            image,
            discriminator=scene.discriminator if step == 3 else None,
            last_layer=scene.last_layer,
            global_step=step,
        )
        disc_total, disc_logs = loss.discriminator_loss(
            scene.images, image, discriminator=scene.discriminator, global_step=step
        )
        totals[step] = (total - logs["nll"]).item()
        assert logs["disc_factor"].item() == disc_logs["disc_factor"].item() == (step == 3) * 0.5
        assert loss.discriminator_active(step) == (step == 3)
        assert (disc_total.item() != 0) == (step == 3)
        disc_total.backward()
    assert totals[2] == 0
    assert totals[3] == pytest.approx(0.5 * (logs["d_weight"] * logs["g_loss"]).item(), rel=1e-9)
    assert set(logs) >= {"grad_norm_rec", "grad_norm_adv", "d_weight_nonfinite", "logits_fake"}


def test_constant_weight_needs_no_last_layer() -> None:
    scene = Scene()
    loss = FirstStageLoss(config(adaptive_weight=False, discriminator_weight=0.2))
    image = scene.decoder(scene.z)
    total, logs = loss.generator_loss(
        scene.images, image, discriminator=scene.discriminator, global_step=0
    )
    expected = (scene.images - image).abs().mean() - 0.2 * scene.discriminator(image).mean()
    assert_same(scene, total, logs, {"total": expected}, 1e-10)
    with torch.no_grad():
        evaluated, _ = loss.generator_loss(
            scene.images, image, discriminator=scene.discriminator, global_step=0
        )
    assert evaluated.item() == pytest.approx(expected.item(), rel=1e-12)


def test_evaluation_without_gradients() -> None:
    scene = Scene()
    loss = FirstStageLoss(config())
    with torch.no_grad():
        image = scene.decoder(scene.z)
        total, logs = loss.generator_loss(
            scene.images, image, discriminator=scene.discriminator, global_step=0
        )
    assert total.item() == logs["nll"].item() == logs["rec"].item()
    assert logs["d_weight"].item() == 0
    assert logs["g_loss"].item() == pytest.approx(-scene.discriminator(image).mean().item())


def test_two_micro_batches_give_the_mean_of_their_gradients() -> None:
    scene = Scene()
    loss = FirstStageLoss(config())
    wanted = [torch.zeros_like(parameter) for parameter in scene.decoder.parameters()]
    disc_wanted = [torch.zeros_like(parameter) for parameter in scene.discriminator.parameters()]
    for half in (slice(0, 2), slice(2, 4)):
        image = scene.decoder(scene.z[half])
        expected = compvis(scene, scene.images[half], image, kl=scene.kl[half])
        wanted = [
            total + part / 2
            for total, part in zip(wanted, scene.gradients(expected["total"]), strict=True)
        ]
        real, fake = (scene.discriminator(x) for x in (scene.images[half], image.detach()))
        hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
        disc_gradients = torch.autograd.grad(hinge, list(scene.discriminator.parameters()))
        disc_wanted = [a + b / 2 for a, b in zip(disc_wanted, disc_gradients, strict=True)]
    for half in (slice(0, 2), slice(2, 4)):
        image = scene.decoder(scene.z[half])
        total, _ = loss.generator_loss(
            scene.images[half],
            image,
            discriminator=scene.discriminator,
            last_layer=scene.last_layer,
            posterior_kl=scene.kl[half],
            global_step=0,
        )
        disc_total, _ = loss.discriminator_loss(
            scene.images[half], image, discriminator=scene.discriminator, global_step=0
        )
        (total / 2).backward()
        (disc_total / 2).backward()
    for model, gradients in ((scene.decoder, wanted), (scene.discriminator, disc_wanted)):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype: torch.dtype, squeezenet_weights: Path) -> None:
    scene = Scene(torch.float32)
    loss = FirstStageLoss(
        config(
            perceptual_weight=1.0,
            perceptual_net="squeeze",
            perceptual_weights=str(squeezenet_weights),
        )
    )
    arguments = {
        "discriminator": scene.discriminator,
        "last_layer": scene.last_layer,
        "posterior_kl": scene.kl,
        "global_step": 0,
    }
    with torch.autocast("cpu", dtype=dtype):
        image = scene.decoder(scene.z)
        assert image.dtype == dtype
        total, logs = loss.generator_loss(scene.images, image, **arguments)
        disc_total, _ = loss.discriminator_loss(
            scene.images, image, discriminator=scene.discriminator, global_step=0
        )
    assert total.dtype == disc_total.dtype == torch.float32
    assert {value.dtype for value in logs.values()} == {torch.float32}
    # The same half-precision reconstruction, all later arithmetic in float64.
    exact = Scene(torch.float64)
    leaf = image.detach().double().requires_grad_()
    rec = (exact.images - leaf).abs() + loss.perceptual(exact.images, leaf).view(-1, 1, 1, 1)
    g_loss = -exact.discriminator(leaf).mean()
    assert logs["nll"].item() == pytest.approx(rec.sum().item() / 4, rel=1e-5)
    assert logs["g_loss"].item() == pytest.approx(g_loss.item(), rel=1e-4, abs=1e-6)
    hinge = loss._discriminator_loss(
        exact.discriminator(exact.images), exact.discriminator(leaf.detach())
    )
    assert disc_total.item() == pytest.approx(hinge.item(), rel=1e-5)
    exact_logs = compvis(
        exact,
        exact.images,
        exact.decoder(exact.z),
        kl=None,
        perceptual=loss.perceptual,
    )
    assert logs["d_weight"].item() == pytest.approx(exact_logs["d_weight"].item(), rel=0.05)
    total.backward()
    assert all(p.grad.isfinite().all() for p in scene.decoder.parameters())


def test_half_precision_models_are_fed_their_own_dtype() -> None:
    scene = Scene(torch.bfloat16)
    total, _ = FirstStageLoss(config()).generator_loss(
        scene.images,
        scene.decoder(scene.z),
        discriminator=scene.discriminator,
        last_layer=scene.last_layer,
        global_step=0,
    )
    assert total.dtype == torch.float32
    total.backward()
    assert scene.last_layer.grad.isfinite().all()


def test_gradients_scaled_by_a_grad_scaler_unscale_to_the_same() -> None:
    """A GradScaler multiplies the total; the adaptive weight inside must not move."""
    scene = Scene(torch.float32)
    loss = FirstStageLoss(config())
    gradients = []
    for scale in (1.0, 2.0**16):
        total, _ = loss.generator_loss(
            scene.images,
            scene.decoder(scene.z),
            discriminator=scene.discriminator,
            last_layer=scene.last_layer,
            global_step=0,
        )
        gradients.append([gradient / scale for gradient in scene.gradients(total * scale)])
    for plain, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=0, atol=0)


class Broken(nn.Module):
    """A discriminator that has diverged."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).mean(1, keepdim=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_diverged_discriminator_is_left_out_and_reported(value: float, adaptive: bool) -> None:
    scene = Scene(torch.float32)
    loss = FirstStageLoss(config(adaptive_weight=adaptive))
    total, logs = loss.generator_loss(
        scene.images,
        scene.decoder(scene.z),
        discriminator=Broken(value),
        last_layer=scene.last_layer,
        global_step=0,
    )
    assert logs["d_weight_nonfinite"].item() == 1
    assert logs["d_weight"].item() == 0
    assert total.item() == logs["nll"].item()
    alone = FirstStageLoss(config(discriminator_weight=0.0))
    expected, _ = alone.generator_loss(scene.images, scene.decoder(scene.z), global_step=0)
    pairs = zip(scene.gradients(total), scene.gradients(expected), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_blind_discriminator_does_no_harm() -> None:
    scene = Scene(torch.float32)
    total, logs = FirstStageLoss(config()).generator_loss(
        scene.images,
        scene.decoder(scene.z),
        discriminator=Broken(0.0),
        last_layer=scene.last_layer,
        global_step=0,
    )
    assert logs["grad_norm_adv"].item() == 0
    assert logs["d_weight_nonfinite"].item() == 0
    assert math.isfinite(total.item())


def test_nan_reconstructions_show_in_the_total() -> None:
    scene = Scene(torch.float32)
    for reconstruction in ("l1", "l2", "bce"):
        image = scene.decoder(scene.z) * math.nan
        total, _ = FirstStageLoss(config(reconstruction=reconstruction)).generator_loss(
            scene.images,
            image,
            discriminator=scene.discriminator,
            last_layer=scene.last_layer,
            global_step=0,
        )
        assert math.isnan(total.item())


def test_bernoulli_error_is_binary_cross_entropy_inside_the_range() -> None:
    generator = torch.Generator().manual_seed(4)
    target = torch.rand(2, 3, 5, 5, generator=generator, dtype=torch.float64) * 2 - 1
    logit = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    found = bernoulli_error(target, torch.tanh(logit))
    expected = nn.functional.binary_cross_entropy_with_logits(2 * logit, (target + 1) / 2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, logit)
    (wanted,) = torch.autograd.grad(expected, logit)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-14)


def test_bernoulli_gradient_outside_the_range_only_points_back() -> None:
    image = torch.tensor([-5.0, -5.0, 5.0, 5.0, 1e9], dtype=torch.float32, requires_grad=True)
    target = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0])
    error = bernoulli_error(target, image)
    (gradient,) = torch.autograd.grad(error, image)
    assert error.isfinite()
    assert [math.copysign(1, g) if g else 0 for g in gradient.tolist()] == [0, -1, 0, 1, 1]


def test_bad_input_is_named() -> None:
    scene = Scene()
    loss = FirstStageLoss(config())
    image = scene.decoder(scene.z)
    with pytest.raises(DataError, match=r"inputs and reconstructions.*\[4, 3, 20, 20\]"):
        loss.generator_loss(scene.images[:2], image, global_step=0)
    with pytest.raises(ConfigError, match=r"discriminator: needed from step 0"):
        loss.generator_loss(scene.images, image, global_step=0)
    with pytest.raises(ConfigError, match=r"last_layer: .*adaptive_weight: false"):
        loss.generator_loss(scene.images, image, discriminator=scene.discriminator, global_step=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reconstruction", "l3"),
        ("reduction", "sum"),
        ("adversarial_loss", "wasserstein"),
        ("generator_loss", "hinge"),
        ("kl_weight", -1.0),
        ("kl_weight", math.nan),
        ("commitment_weight", "0.25"),
        ("perceptual_weight", True),
        ("discriminator_start", -1),
        ("discriminator_start", 1.5),
    ],
)
def test_bad_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: expected .* got "):
        FirstStageLossConfig(**{field: value})


def test_configuration_is_a_plain_dataclass() -> None:
    made = FirstStageLossConfig.compvis_vq(logvar_init=-1.0)
    assert FirstStageLossConfig(**dataclasses.asdict(made)) == made
    assert (made.reduction, made.legacy, made.discriminator_weight) == ("mean", True, 0.75)
    kl = FirstStageLossConfig.compvis_kl()
    assert (kl.reduction, kl.kl_weight, kl.discriminator_start) == ("sum_per_sample", 1e-6, 50001)


@pytest.mark.parametrize("adversarial_loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("reconstruction", ["l1", "bce"])
def test_a_short_training_run_behaves(adversarial_loss: str, reconstruction: str) -> None:
    """Both players train for some steps across the start: all finite, reconstruction improves."""
    scene = Scene(torch.float32, size=16)
    decoder, discriminator = copy.deepcopy(scene.decoder), scene.discriminator
    loss = FirstStageLoss(
        config(
            adversarial_loss=adversarial_loss,
            reconstruction=reconstruction,
            discriminator_start=10,
            discriminator_weight=0.1,
        )
    )
    z = nn.Parameter(scene.z)
    optimiser = torch.optim.Adam([*decoder.parameters(), z], lr=1e-2)
    disc_optimiser = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    history: list[dict[str, float]] = []
    for step in range(40):
        image = decoder(z)
        total, logs = loss.generator_loss(
            scene.images,
            image,
            discriminator=discriminator,
            last_layer=decoder.conv_out.weight,
            posterior_kl=z.square().mean((1, 2, 3)),
            global_step=step,
        )
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        disc_total, disc_logs = loss.discriminator_loss(
            scene.images, image, discriminator=discriminator, global_step=step
        )
        disc_optimiser.zero_grad()
        disc_total.backward()
        disc_optimiser.step()
        logs |= disc_logs | {"distance": (scene.images - image).abs().mean()}
        history.append({name: value.item() for name, value in logs.items()})
    assert all(math.isfinite(value) for logs in history for value in logs.values())
    assert history[-1]["rec"] < history[0]["rec"]
    assert history[-1]["distance"] < 0.7 * history[0]["distance"]
    assert history[9]["d_weight"] == 0 < history[10]["d_weight"]
    assert history[-1]["disc_loss"] < history[10]["disc_loss"]
    gap = [logs["logits_real"] - logs["logits_fake"] for logs in history]
    assert max(gap[11:]) > gap[10]
