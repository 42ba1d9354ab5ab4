"""What the samplers that count their steps share: where a run is, and steps on the device."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch

from fastldm import schedulers
from fastldm.errors import ConfigError

EXPLODING = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
             "LMSDiscreteScheduler"]  # fmt: skip
PRESERVING = ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
              "UniPCMultistepScheduler"]  # fmt: skip
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
each = pytest.mark.parametrize("name", [*EXPLODING, *PRESERVING])


def make(name, **config):
    return getattr(schedulers, name)(**SD, **config)


@each
@pytest.mark.parametrize("begin", [None, 4])
def test_noise_is_added_as_diffusers_does(name, begin):
    ours, theirs = make(name), getattr(diffusers, name)(**SD)
    sample, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).unbind()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        if begin is not None:
            scheduler.set_begin_index(begin)
    timesteps = ours.timesteps[[2, 4, 8]]
    got, want = (scheduler.add_noise(sample, noise, timesteps) for scheduler in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    half = ours.add_noise(sample.half(), noise.half(), timesteps)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), want, rtol=2e-3, atol=2e-3)


@each
def test_noise_of_a_time_step_that_is_not_visited(name):
    scheduler = make(name)
    scheduler.set_timesteps(10)
    sample = torch.zeros(1, 2, 2, 2)
    with pytest.raises(ConfigError, match="timesteps"):
        scheduler.add_noise(sample, sample, torch.tensor([998.25]))


@pytest.mark.parametrize("name", PRESERVING)
def test_noise_of_every_training_time_step_before_a_run(name):
    scheduler = make(name)
    sample, noise = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    timesteps = torch.tensor([0, 1, 500, 999])
    want = schedulers.DDPMScheduler(**SD).add_noise(sample, noise, timesteps)
    torch.testing.assert_close(
        scheduler.add_noise(sample, noise, timesteps), want, rtol=1e-6, atol=1e-6
    )


@each
def test_the_place_in_a_run(name):
    scheduler = make(name)
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 2, 2, 2)
    assert scheduler.step_index is scheduler.begin_index is None
    start = scheduler.timesteps[0]
    for index, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(sample, timestep)
        scheduler.step(sample, timestep, sample)
        assert scheduler.step_index == index + 1
    with pytest.raises(ConfigError, match="run has ended"):
        scheduler.step(sample, start, sample)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None
    with pytest.raises(ConfigError, match="timestep: got 17; accepted: one of the"):
        scheduler.step(sample, 17, sample)
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    scheduler.step(sample, 17, sample)
    assert scheduler.step_index == 3


@each
def test_a_copy_is_independent(name):
    scheduler = make(name)
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 2, 2, 2)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    twins = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))
    scheduler.step(sample, scheduler.timesteps[1], sample)
    assert [twin.step_index for twin in twins] == [1, 1]


@each
def test_bad_time_steps_are_named(name):
    scheduler = make(name)
    for arguments, message in [
        ({}, "exactly one"),
        ({"num_inference_steps": 3, "timesteps": [3]}, "exactly one"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"timesteps": [3, 4]}, "timesteps"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": [1000, 4]}, "timesteps"),
        ({"sigmas": [1.0]}, "sigmas"),
        ({"sigmas": [0.0, 1.0]}, "sigmas"),
        ({"sigmas": [1.0, -1.0]}, "sigmas"),
    ]:
        with pytest.raises(ConfigError, match=message):
            scheduler.set_timesteps(**arguments)
    spaced = (
        make(name)
        if name == "EulerAncestralDiscreteScheduler"
        else make(name, use_karras_sigmas=True)
    )
    if spaced.config.get("use_karras_sigmas"):
        with pytest.raises(ConfigError, match="timesteps: given"):
            spaced.set_timesteps(timesteps=[3, 1])


COMPILED = [name for name in (*EXPLODING, *PRESERVING) if "Singlestep" not in name]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_has_no_graph_breaks(name):
    """From the first one on, and few graphs serve the whole run."""
    scheduler = make(name)
    torch._dynamo.reset()

    def step(output, timestep, sample):
        options = {}
        if name == "EulerAncestralDiscreteScheduler":
            options["variance_noise"] = noise
        return scheduler.step(output, timestep, sample, **options).prev_sample

    sample, output, noise = torch.randn(3, 2, 3, 4, 4).unbind()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    results = []
    for call in (step, compiled):
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(0)
        results.append([call(output, timestep, sample) for timestep in scheduler.timesteps])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)
    assert len(graphs) <= 8
    torch._dynamo.reset()
