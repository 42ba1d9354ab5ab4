"""Encoding, the loss and its gradients, and a short training."""

from __future__ import annotations

import pytest
import torch

from fastldm import LatentDiffusion
from fastldm.errors import DataError
from fastldm.losses import DiffusionLossConfig

KINDS = ["none", "crossattn", "classes", "concat", "hybrid", "class"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_papers(build, prediction_type: str) -> None:
    """‖target − model(√ᾱ·z + √(1−ᾱ)·ε, t)‖² in float64."""
    scheduler = build.scheduler(prediction_type=prediction_type)
    model = build.model(scheduler=scheduler).double()
    z, noise = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 999])
    loss, logs = model.loss(z, noise=noise, timesteps=t)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
    output = model.unet(bar.sqrt() * z + (1 - bar).sqrt() * noise, t).sample
    velocity = bar.sqrt() * noise - (1 - bar).sqrt() * z
    target = {"epsilon": noise, "sample": z, "v_prediction": velocity}[prediction_type]
    expected = ((target - output) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["loss_simple"], expected.detach(), rtol=1e-4, atol=0)


def test_a_call_is_the_loss(build) -> None:
    model = build.model()
    z = torch.randn(2, 3, 4, 4)
    first = model(z, generator=torch.Generator().manual_seed(5))[0]
    again = model.loss(z, generator=torch.Generator().manual_seed(5))[0]
    other = model.loss(z, generator=torch.Generator().manual_seed(6))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_timesteps_and_noise_have_the_right_distribution(build) -> None:
    oracle = build.oracle(lambda sample, _: torch.zeros_like(sample))
    model = LatentDiffusion(build.first_stage(), oracle, build.scheduler())
    model.loss(torch.zeros(4000, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    z_t, t, _ = oracle.calls[0]
    assert t.min() < 10
    assert t.max() > 989
    assert abs(t.float().mean() - 499.5) < 4 * 1000 / 12**0.5 / 4000**0.5
    noise = z_t / (1 - model.scheduler.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_unet_and_conditioner_but_not_the_first_stage(build, kind: str) -> None:
    model = build.model(kind, loss=DiffusionLossConfig(learn_logvar=True)).train()
    z = model.encode(torch.rand(3, 3, 8, 8) * 2 - 1)
    assert not z.requires_grad
    loss, _ = model.loss(z, build.condition(kind))
    loss.backward()
    assert all(p.grad is None for p in model.first_stage.parameters())
    assert not model.first_stage.training
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == expected
    assert any(name.startswith("unet.") for name in trained)
    has_conditioner = kind in ("crossattn", "classes", "hybrid")
    assert any(name.startswith("conditioner.") for name in trained) == has_conditioner
    assert "objective.logvar" in trained


def test_a_frozen_conditioner_stays_as_it_is(build) -> None:
    model = build.model(
        "crossattn", conditioner=build.text_encoder(dropout=0.5), train_conditioner=False
    ).train()
    loss, _ = model.loss(torch.randn(3, 3, 4, 4), build.condition("crossattn"))
    loss.backward()
    assert all(p.grad is None for p in model.conditioner.parameters())
    assert not model.conditioner.training
    assert model.unet.training


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_encode_and_decode(build, kind: str) -> None:
    stage = build.first_stage(kind)
    model = LatentDiffusion(stage, build.unet(), build.scheduler(), scaling_factor=0.5)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    z = model.encode(images, torch.Generator().manual_seed(1))
    if kind == "kl":
        raw = stage.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
    else:
        raw = stage.encode(images).latents
    torch.testing.assert_close(z, 0.5 * raw)
    torch.testing.assert_close(model.decode(z), stage.decode(raw).sample)


def test_an_image_is_encoded_by_its_own_generator(build) -> None:
    model = build.model()
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    together = model.encode(images, [torch.Generator().manual_seed(s) for s in (1, 2, 3)])
    alone = model.encode(images[1:2], [torch.Generator().manual_seed(2)])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)


def test_conditions_are_dropped_at_the_rate_asked_for_and_only_in_training(build) -> None:
    oracle = build.oracle(lambda sample, _, class_labels: sample, num_class_embeds=4)
    model = LatentDiffusion(
        build.first_stage(),
        oracle,
        build.scheduler(),
        conditioning="class",
        conditioning_dropout=0.2,
    )
    z, labels = torch.zeros(5000, 3, 2, 2), torch.zeros(5000, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    model.train().loss(z, labels, generator=generator)
    share = (oracle.calls[-1][2]["class_labels"] == 3).float().mean()
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 5000) ** 0.5
    model.eval().loss(z, labels, generator=generator)
    assert (oracle.calls[-1][2]["class_labels"] == 0).all()
    model.loss(z, labels, drop=torch.arange(5000) < 7)
    assert (oracle.calls[-1][2]["class_labels"] == 3).sum() == 7


def test_half_precision_models_work_on_float32_latents(build) -> None:
    model = build.model("crossattn")
    model.unet.to(torch.bfloat16)
    captions = build.condition("crossattn")
    loss, _ = model.loss(torch.randn(3, 3, 4, 4), captions)
    assert loss.dtype == torch.float32
    z = model.sample(captions=captions, num_inference_steps=2, seeds=0, output="latents")
    assert z.dtype == torch.float32
    assert z.isfinite().all()


def test_other_weights_for_a_while(build) -> None:
    model = build.model("crossattn")
    unet, conditioner = build.cross_unet(), build.text_encoder()
    trained = model.unet, model.conditioner
    with model.using(unet=unet, conditioner=conditioner) as other:
        assert (other.unet, other.conditioner) == (unet, conditioner)
    assert (model.unet, model.conditioner) == trained
    with model.using(unet=unet):
        assert (model.unet, model.conditioner) == (unet, trained[1])
        with pytest.raises(DataError), model.using(conditioner=conditioner):
            model.sample(2, captions=["a", "b", "c"])
        assert model.conditioner is trained[1]
    assert model.unet is trained[0]


def test_latents_of_another_shape_are_refused(build) -> None:
    with pytest.raises(DataError, match=r"z: expected \[B, 3, h, w\], got \[2, 4, 4, 4\]"):
        build.model().loss(torch.randn(2, 4, 4, 4))


def test_a_short_training_learns_classes(build) -> None:
    """The loss on fixed noise falls, and guided samples lie near the latents of their class."""
    unet = build.cross_unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    scheduler = build.scheduler(prediction_type="v_prediction")
    model = build.model("classes", conditioning_dropout=0.1, unet=unet, scheduler=scheduler)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 3, 4, 4, generator=generator)
    labels = torch.arange(3).repeat(4)
    fixed = {
        "noise": torch.randn(12, 3, 4, 4, generator=generator),
        "timesteps": torch.randint(1000, (12,), generator=generator),
    }

    def validation_loss() -> float:
        with torch.no_grad():
            return float(model.eval().loss(centres[labels], labels, **fixed)[0])

    before = validation_loss()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=4e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(centres[labels], labels, generator=generator)[0].backward()
        optimizer.step()
    assert validation_loss() < 0.3 * before
    z = model.sample(
        class_labels=labels, num_inference_steps=20, guidance_scale=1.5, seeds=1, output="latents"
    )
    distances = torch.cdist(z.flatten(1), centres.flatten(1))
    assert (distances.argmin(dim=1) == labels).all()


def test_a_scheduler_that_clips_latents_is_warned_of(build) -> None:
    with pytest.warns(UserWarning, match="clip_sample is True"):
        build.model(scheduler=build.scheduler(clip_sample=True))
