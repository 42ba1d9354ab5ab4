"""The forward process, the checks of the config, and steps that never leave the device."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.schedulers import DDIMScheduler, DDPMScheduler

PAIRS = [(DDIMScheduler, diffusers.DDIMScheduler), (DDPMScheduler, diffusers.DDPMScheduler)]
both = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["ddim", "ddpm"])
each = pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])


@both
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 7)])
def test_forward_process_is_that_of_diffusers(ours, theirs, method, dtype, shape):
    config = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    sample, noise = torch.randn(2, *shape, dtype=dtype).unbind()
    for timesteps in (torch.tensor([0, 1, 500, 999]), torch.tensor([7]), torch.tensor(7)):
        got, want = (
            getattr(cls(**config), method)(sample, noise, timesteps) for cls in (ours, theirs)
        )
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precisions_are_rounded_once(method, dtype):
    """At t = 0, 1 − ᾱ is 1e-4, which half precision arithmetic loses."""
    scheduler = DDPMScheduler()
    sample, noise = torch.randn(2, 4, 3, 5, 5).to(dtype).unbind()
    timesteps = torch.tensor([0, 1, 500, 999])
    got = getattr(scheduler, method)(sample, noise, timesteps)
    exact = getattr(scheduler, method)(sample.double(), noise.double(), timesteps)
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype)) or torch.allclose(
        got.double(), exact, rtol=torch.finfo(dtype).eps, atol=0
    )


def test_forward_process_is_differentiable():
    scheduler = DDPMScheduler()
    sample = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    timesteps, upstream = torch.tensor([100, 900]), torch.randn(2, 3, dtype=torch.float64)
    noisy = scheduler.add_noise(sample, torch.randn_like(sample), timesteps)
    (gradient,) = torch.autograd.grad(noisy, sample, upstream)
    signal = scheduler.alphas_cumprod.double()[timesteps].sqrt().unsqueeze(1)
    torch.testing.assert_close(gradient, signal * upstream)


@both
def test_attributes_are_those_of_diffusers(ours, theirs):
    ours, theirs = ours(beta_schedule="scaled_linear"), theirs(beta_schedule="scaled_linear")
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
    assert len(ours) == len(theirs) == 1000
    assert ours.order == theirs.order
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    sample = torch.randn(2, 3)
    assert ours.scale_model_input(sample, 5) is sample


@each
def test_replaced_alphas_are_used(cls):
    scheduler, shifted = cls(), cls(beta_schedule="scaled_linear")
    sample, output = torch.randn(2, 1, 3, 4, 4).unbind()
    timesteps = torch.tensor([400])
    for one in (scheduler, shifted):
        one.set_timesteps(10)
        one.step(output, 0, sample)
        one.add_noise(sample, output, timesteps)
    scheduler.alphas_cumprod = shifted.alphas_cumprod.clone()
    results = [
        one.step(output, 400, sample, generator=torch.Generator().manual_seed(0)).prev_sample
        for one in (scheduler, shifted)
    ]
    assert torch.equal(*results)
    noisy = [one.add_noise(sample, output, timesteps) for one in (scheduler, shifted)]
    assert torch.equal(*noisy)


@each
def test_a_copy_is_independent(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    twins = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))
    scheduler.set_timesteps(50)
    for twin in twins:
        assert len(twin.timesteps) == 10
        assert twin.config == scheduler.config


@each
@pytest.mark.parametrize("limits", [{}, {"thresholding": True, "sample_max_value": 2.0}], ids=str)
def test_one_compiled_step_serves_every_time_step(cls, limits):
    scheduler = cls(**limits)
    scheduler.set_timesteps(10)
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def step(output, timestep, sample):
        options = {"eta": 0.5} if cls is DDIMScheduler else {}
        return scheduler.step(output, timestep, sample, seed=3, **options).prev_sample

    sample, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    want = [step(output, timestep, sample) for timestep in scheduler.timesteps]
    compiled = torch.compile(step, fullgraph=True, backend=count)
    for timestep, expected in zip(scheduler.timesteps, want, strict=True):
        torch.testing.assert_close(compiled(output, timestep.clone(), sample), expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_samples_stay_half_precision(cls, dtype):
    scheduler = cls()
    scheduler.set_timesteps(10)
    sample, output, noise = torch.randn(3, 1, 3, 4, 4).to(dtype).unbind()
    options = {"eta": 1.0} if cls is DDIMScheduler else {}
    got = scheduler.step(output, 300, sample, variance_noise=noise, **options)
    exact = scheduler.step(
        output.double(), 300, sample.double(), variance_noise=noise.double(), **options
    )
    for half, full in zip(got, exact, strict=True):
        assert half.dtype == dtype
        bound = torch.finfo(dtype).eps
        torch.testing.assert_close(half.double(), full, rtol=bound, atol=bound)


WRONG = {
    "num_train_timesteps": [0, -1, 2.5, True, "1000"],
    "beta_start": [-0.1, 2.0, "small"],
    "beta_end": [-0.1, 2.0, None],
    "beta_schedule": ["quadratic", None],
    "trained_betas": [[0.1], [2.0] * 1000, "many", 0.1],
    "prediction_type": ["flow_prediction", "eps", None],
    "timestep_spacing": ["even", None],
    "steps_offset": [-1, 0.5],
    "clip_sample_range": ["one", 0.0, -1.0],
    "dynamic_thresholding_ratio": [-0.1, 1.1, "most"],
    "sample_max_value": [None, 0.0],
    "schedule_dtype": ["float16", torch.float64],
}


@each
@pytest.mark.parametrize("field", WRONG)
def test_wrong_fields_are_named(cls, field):
    for value in WRONG[field]:
        with pytest.raises(ConfigError, match=field):
            cls(**{field: value})
