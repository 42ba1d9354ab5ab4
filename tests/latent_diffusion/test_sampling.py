"""Sampling: against known answers, diffusers' schedulers, and itself in other batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastldm import DDIMScheduler, DDPMScheduler, LatentDiffusion
from fastldm.errors import ConfigError, DataError
from fastldm.latent_diffusion.sampling import make_generators

KINDS = ["none", "crossattn", "classes", "concat", "hybrid", "class"]
NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
}


def options_for(kind: str, condition: Any) -> dict[str, Any]:
    name = {"crossattn": "captions", "class": "class_labels", "classes": "class_labels"}.get(
        kind, "conditioning"
    )
    return {} if condition is None else {name: condition}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_perfect_model_recovers_the_data(build, prediction_type: str, steps: int) -> None:
    scheduler = build.scheduler(set_alpha_to_one=True, prediction_type=prediction_type)
    data = torch.randn(2, 3, 4, 4)

    def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar = scheduler.alphas_cumprod[t]
        noise = (z_t - bar.sqrt() * data) / (1 - bar).sqrt()
        velocity = bar.sqrt() * noise - (1 - bar).sqrt() * data
        return {"epsilon": noise, "sample": data, "v_prediction": velocity}[prediction_type]

    model = LatentDiffusion(build.first_stage(), build.oracle(predict), scheduler)
    for eta in (0.0, 1.0):
        z = model.sample(2, num_inference_steps=steps, eta=eta, seeds=3, output="latents")
        torch.testing.assert_close(z, data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_samples_images(build, kind: str) -> None:
    model = build.model(kind).train()
    given = options_for(kind, build.condition(kind))
    guidance = {} if kind == "none" else {"guidance_scale": 2.0}
    images = model.sample(3, **given, num_inference_steps=2, seeds=0, **guidance)
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert not images.requires_grad
    assert model.training
    latents = model.sample(3, **given, num_inference_steps=2, seeds=0, **guidance, output="latents")
    expected = model.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("kind", ["none", "crossattn", "classes", "concat", "hybrid", "class"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_an_image_depends_on_its_seed_alone(build, kind: str, scheduler: type) -> None:
    model = build.model(kind).eval()
    condition = build.condition(kind)
    common: dict[str, Any] = {
        "num_inference_steps": 3,
        "scheduler": scheduler(**NOISE, clip_sample=False),
        "output": "latents",
    }
    if scheduler is DDIMScheduler:
        common["eta"] = 1.0
    if kind != "none":
        common["guidance_scale"] = 1.5
    together = model.sample(3, **options_for(kind, condition), seeds=[7, 8, 9], **common)
    order = [2, 0, 1]
    if isinstance(condition, dict):
        part = {
            "crossattn": [condition["crossattn"][i] for i in order],
            "concat": condition["concat"][order],
        }
        one = {"crossattn": condition["crossattn"][1:2], "concat": condition["concat"][1:2]}
    elif condition is None:
        part = one = None
    else:
        part = [condition[i] for i in order]
        part = torch.stack(part) if isinstance(condition, torch.Tensor) else part
        one = condition[1:2]
    shuffled = model.sample(3, **options_for(kind, part), seeds=[9, 7, 8], **common)
    alone = model.sample(1, **options_for(kind, one), seeds=[8], **common)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_seeds(build) -> None:
    model = build.model().eval()
    common: dict[str, Any] = {"num_inference_steps": 2, "output": "latents"}
    torch.testing.assert_close(
        model.sample(2, seeds=5, **common), model.sample(2, seeds=[5, 6], **common)
    )
    torch.manual_seed(1)
    first = model.sample(2, **common)
    assert not torch.equal(first, model.sample(2, **common))
    torch.manual_seed(1)
    assert torch.equal(first, model.sample(2, **common))
    with pytest.raises(DataError, match="seeds: got 3 for 2 images"):
        model.sample(2, seeds=[1, 2, 3])
    assert make_generators(4, 1)[0].initial_seed() == 4


@pytest.mark.parametrize("kind", ["crossattn", "classes", "concat", "hybrid", "class"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_two_predictions_in_one_call(build, kind: str, rescale: float) -> None:
    model = build.model(kind).eval()
    condition = build.condition(kind)
    sizes = []
    model.unet.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    given = options_for(kind, condition)
    z = model.sample(
        **given, num_inference_steps=4, guidance_scale=3.0, guidance_rescale=rescale,
        seeds=0, output="latents",
    )  # fmt: skip
    assert sizes == [6] * 4

    scheduler = build.scheduler()
    scheduler.set_timesteps(4)
    everyone = torch.ones(3, dtype=torch.bool)
    expected = torch.cat([torch.randn(1, 3, 4, 4, generator=g) for g in make_generators(0, 3)])
    with torch.no_grad():
        conditional = model.encode_condition(condition, 3)
        unconditional = model.encode_condition(condition, 3, everyone)
        for t in scheduler.timesteps:
            c = model.predict(expected, t, conditional)
            u = model.predict(expected, t, unconditional)
            guided = u + 3.0 * (c - u)
            dims = (1, 2, 3)
            ratio = c.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
            guided = rescale * guided * ratio + (1 - rescale) * guided
            expected = scheduler.step(guided, t, expected).prev_sample
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_no_guidance_is_one_prediction(build) -> None:
    model = build.model("crossattn").eval()
    sizes = []
    model.unet.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model.sample(captions=build.captions, num_inference_steps=2, seeds=0)
    assert sizes == [4, 4]


def test_negative_conditions_take_the_place_of_none(build) -> None:
    model = build.model("crossattn").eval()
    common: dict[str, Any] = {
        "num_inference_steps": 2, "guidance_scale": 4.0, "seeds": 0, "output": "latents",
    }  # fmt: skip
    plain = model.sample(2, captions=["a red cat"], **common)
    empty = model.sample(2, captions=["a red cat"], negative=[""], **common)
    other = model.sample(2, captions=["a red cat"], negative=["a blue dog"], **common)
    torch.testing.assert_close(plain, empty)
    assert not torch.allclose(plain, other)
    with pytest.raises(DataError, match=r"context is \[8, 12\] with and \[3, 12\] without"):
        model.sample(captions=["a"], negative=torch.randn(1, 3, 12), **common)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_schedulers_of_diffusers(build, name: str) -> None:
    """Against the plain loop of a diffusers pipeline, with guidance."""
    import diffusers

    kind = getattr(diffusers, name)
    extra = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    model = build.model("classes").eval()
    z = model.sample(
        class_labels=[0, 2], num_inference_steps=5, guidance_scale=2.0, seeds=0,
        scheduler=kind(**NOISE, **extra), output="latents",
    )  # fmt: skip

    scheduler = kind(**NOISE, **extra)
    scheduler.set_timesteps(5)
    generators = make_generators(0, 2)
    expected = torch.cat([torch.randn(1, 3, 4, 4, generator=g) for g in generators])
    expected = expected * scheduler.init_noise_sigma
    weight = model.conditioner.embedding.weight
    context = weight[torch.tensor([0, 2, 3, 3])][:, None]
    takes_generator = "generator" in kind.step.__annotations__
    options = {"generator": generators} if takes_generator else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(expected, t)
            c, u = model.unet(torch.cat([inputs, inputs]), t, context).sample.chunk(2)
            expected = scheduler.step(u + 2.0 * (c - u), t, expected, **options).prev_sample
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_ours_equals_diffusers_scheduler(build) -> None:
    import diffusers

    model = build.model("crossattn").eval()
    config = dict(model.scheduler.config)
    config.pop("schedule_dtype", None)
    theirs = diffusers.DDIMScheduler.from_config(config)
    common: dict[str, Any] = {
        "captions": build.captions, "num_inference_steps": 6, "guidance_scale": 5.0,
        "guidance_rescale": 0.5, "eta": 0.7, "seeds": 1, "output": "latents",
    }  # fmt: skip
    torch.testing.assert_close(
        model.sample(**common), model.sample(scheduler=theirs, **common), rtol=1e-3, atol=1e-3
    )


def test_training_on_a_diffusers_scheduler(build) -> None:
    import diffusers

    theirs = diffusers.DDPMScheduler(**NOISE, clip_sample=False, prediction_type="v_prediction")
    ours = DDPMScheduler(**NOISE, clip_sample=False, prediction_type="v_prediction")
    model = build.model(scheduler=ours)
    other = LatentDiffusion(model.first_stage, model.unet, theirs)
    given = {"noise": torch.randn(4, 3, 4, 4), "timesteps": torch.tensor([0, 9, 500, 999])}
    z = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(model.loss(z, **given)[0], other.loss(z, **given)[0])


def test_the_callback_sees_every_step(build) -> None:
    model = build.model().eval()
    seen = []
    z = model.sample(
        2,
        num_inference_steps=4,
        seeds=0,
        callback=lambda index, t, z: seen.append((index, int(t), z.clone())),
        output="latents",
    )
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == model.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], z)
    assert not torch.equal(seen[0][2], z)


def test_the_progress_bar_is_optional(build, capsys) -> None:
    model = build.model().eval()
    model.sample(1, num_inference_steps=2)
    assert capsys.readouterr().err == ""
    model.sample(1, num_inference_steps=2, progress=True)
    assert "Sampling" in capsys.readouterr().err


def test_sizes(build) -> None:
    model = build.model().eval()
    common: dict[str, Any] = {"num_inference_steps": 1, "seeds": 0}
    assert model.sample(1, size=(16, 8), **common).shape == (1, 3, 16, 8)
    for size in ((9, 8), (0, 8)):
        with pytest.raises(DataError, match="multiples of f = 2"):
            model.sample(1, size=size, **common)
    nowhere = build.model(unet=build.unet(sample_size=None))
    with pytest.raises(ConfigError, match="size: not given"):
        nowhere.sample(1, **common)
    oblong = build.model(unet=build.unet(sample_size=(4, 8)))
    assert oblong.sample(1, **common).shape == (1, 3, 8, 16)
    model = build.model("concat").eval()
    wide = torch.randn(1, 2, 4, 8)
    assert model.sample(2, conditioning=wide, **common).shape == (2, 3, 8, 16)


def test_bad_requests_are_named(build) -> None:
    model = build.model().eval()
    with pytest.raises(ConfigError, match=r"guidance_scale: got 2\.0; an unconditional model"):
        model.sample(1, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="prediction_type is 'sample', but the model predicts"):
        model.sample(1, scheduler=build.scheduler(prediction_type="sample"))
    with pytest.raises(ConfigError, match="output: got 'pil'"):
        model.sample(1, output="pil")
    with pytest.raises(ConfigError, match=r"eta: got 0\.5, but DDPMScheduler has none"):
        model.sample(1, eta=0.5, scheduler=DDPMScheduler(**NOISE), num_inference_steps=2)
    text = build.model("crossattn")
    with pytest.raises(DataError, match="captions, class_labels: give one of them"):
        text.sample(captions=["a"], class_labels=[1])
    with pytest.raises(DataError, match="got 2 conditions for 3 samples"):
        text.sample(3, captions=["a", "b"])
    with pytest.raises(DataError, match="expected a batch of conditions, got str"):
        text.sample(captions="a red cat")


def test_given_noise_is_where_a_run_starts_and_its_dtype_is_that_of_the_steps(build) -> None:
    """CompVis's DDIM in float64 through the whole object, by its formula."""
    bars = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    visited = np.arange(0, 1000, 1000 // 7) + 1

    def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(z_t + 0.01 * t.double())

    scheduler = build.scheduler(timestep_spacing="uniform", schedule_dtype="float64")
    model = LatentDiffusion(build.first_stage(), build.oracle(predict).double(), scheduler)
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = model.sample(latents=noise, num_inference_steps=7, output="latents")
    assert found.dtype == torch.float64
    z = noise.numpy()
    for index in range(len(visited))[::-1]:
        bar, following = bars[visited[index]], bars[visited[index - 1] if index else 0]
        output = np.sin(z + 0.01 * visited[index])
        start = (z - np.sqrt(1 - bar) * output) / np.sqrt(bar)
        z = np.sqrt(following) * start + np.sqrt(1 - following) * output
    np.testing.assert_allclose(found.numpy(), z, rtol=1e-10, atol=1e-11)
    with pytest.raises(DataError, match="latents: got 2 for 3 images"):
        model.sample(3, latents=noise)
    with pytest.raises(DataError, match=r"z: expected \[B, 3, h, w\]"):
        model.sample(latents=noise[:, :2])
