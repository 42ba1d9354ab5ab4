"""The Triton kernels of the sampling steps at full size; they need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops.diffusion_step.reference import philox_normal
from fastldm.schedulers import DDIMScheduler, DDPMScheduler

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FULL_SIZES = [(8, 4, 64, 64), (1, 16, 128, 128), (64, 4, 128, 128), (3, 4, 65, 63)]
STEPS: dict[str, Callable[..., ops.DiffusionStepOutput]] = {
    "ddim": ops.ddim_step, "ddpm": ops.ddpm_step,
}  # fmt: skip


def _draw(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    names = ("sample", "model_output", "model_output_uncond", "noise", "predicted_variance")
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    drawn = {
        name: torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for name in names
    }
    drawn["predicted_variance"] = drawn["predicted_variance"].sigmoid()
    return {name: value.contiguous(memory_format=memory_format) for name, value in drawn.items()}


def _coefficients(op: str, variance_type: str = "fixed_small") -> Tensor:
    alpha, alpha_prev = torch.tensor(0.4), torch.tensor(0.7)
    if op == "ddim":
        return ops.ddim_coefficients(alpha, alpha_prev, 0.6).to(DEVICE)
    return ops.ddpm_coefficients(alpha, alpha_prev, variance_type).to(DEVICE)


def _step(op: str, backend: str, operands: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Both results, where the sample is."""
    packed = _coefficients(op, options.get("variance_type", "fixed_small"))
    packed = packed.to(operands["sample"].device)
    with ops.backend(backend):
        return list(STEPS[op](coefficients=packed, **operands, **options))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", FULL_SIZES, ids=str)
def test_full_sizes(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    assert_accurate: Any,
) -> None:
    drawn = _draw(shape, dtype, memory_format)
    variance = drawn.pop("predicted_variance")
    cases: list[tuple[str, dict[str, Tensor], dict[str, Any]]] = [
        ("ddim", drawn, {"guidance_scale": 7.5, "guidance_rescale": 0.7}),
        ("ddim", drawn, {"guidance_scale": 7.5, "prediction_type": "v_prediction"}),
        ("ddpm", drawn, {"guidance_scale": 3.0, "clip_range": 1.0}),
        ("ddpm", {**drawn, "predicted_variance": variance}, {"variance_type": "learned_range"}),
    ]
    for op, operands, options in cases:
        found = _step(op, "triton", operands, **options)
        plain = _step(op, "reference", operands, **options)
        wide = {name: value.double() for name, value in operands.items()}
        exact = _step(op, "reference", wide, **options)
        for actual, same_dtype, truth in zip(found, plain, exact, strict=True):
            assert actual.is_contiguous(memory_format=memory_format)
            assert_accurate(actual, same_dtype, truth)


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "outputs channels_last"])
@pytest.mark.parametrize("seed", [2**63 + 5, "a sample"])
def test_bits_are_those_of_the_reference_on_a_cpu(op: str, layout: str, seed: Any) -> None:
    """Drawn noise included: no product is fused, and no quotient or root is approximated."""
    drawn = _draw((3, 4, 64, 63))
    names = ("sample", "model_output", "model_output_uncond")
    operands = {
        name: drawn[name].contiguous(memory_format=torch.channels_last)
        if layout == "channels_last" or (layout != "contiguous" and name != "sample")
        else drawn[name]
        for name in names
    }
    seeds = torch.tensor([3, -1, 2**40], device=DEVICE) if seed == "a sample" else seed
    options: dict[str, Any] = {"guidance_scale": 7.5, "offset": 2**33 + 1}
    found = _step(op, "triton", operands, seed=seeds, **options)
    on_cpu = {name: value.cpu() for name, value in operands.items()}
    expected = _step(
        op, "reference", on_cpu, seed=seeds.cpu() if isinstance(seeds, Tensor) else seeds, **options
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_a_million_normal_numbers_have_the_reference_s_bits() -> None:
    nothing = torch.zeros(1, 2**20, device=DEVICE)
    # √ᾱ, √(1−ᾱ), √ᾱ_prev, direction, σ: what is left is the noise.
    row = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], device=DEVICE)
    with ops.backend("triton"):
        found = ops.ddim_step(nothing, nothing, row, seed=17, offset=2**40).prev_sample
    expected = philox_normal(
        nothing.shape, torch.float32, torch.tensor([17]), torch.tensor(2**40)
    )  # fmt: skip
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("op", STEPS)
def test_a_hundred_runs_are_bit_equal(op: str) -> None:
    drawn = _draw((8, 4, 64, 64), torch.float16)
    del drawn["noise"], drawn["predicted_variance"]
    options = {"guidance_scale": 7.5, "guidance_rescale": 0.7, "seed": 3, "offset": 5}
    first = _step(op, "triton", drawn, **options)
    for _ in range(99):
        again = _step(op, "triton", drawn, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_one_graph_serves_every_time_step(kind: type[DDIMScheduler | DDPMScheduler]) -> None:
    scheduler = kind()
    scheduler.set_timesteps(20, device=DEVICE)
    options: dict[str, Any] = {"eta": 1.0} if kind is DDIMScheduler else {}
    drawn = _draw((2, 4, 32, 32))
    output, uncond = drawn["model_output"], drawn["model_output_uncond"]

    def step(sample: Tensor, timestep: Tensor) -> Tensor:
        found = scheduler.step(
            output, timestep, sample, model_output_uncond=uncond, guidance_scale=3.0, seed=1,
            return_original=False, **options,
        )  # fmt: skip
        return found[0]

    expected = drawn["sample"].clone()
    sample, timestep = drawn["sample"].clone(), scheduler.timesteps[0].clone()
    with ops.backend("triton"):
        step(sample, timestep)  # compiles, and puts the table onto the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(sample, timestep)
        for each in scheduler.timesteps:
            timestep.copy_(each)
            graph.replay()
            expected = step(expected, each)
            assert torch.equal(captured, expected)
            sample.copy_(captured)


def test_a_side_stream() -> None:
    drawn = _draw((8, 4, 64, 64))
    del drawn["predicted_variance"]
    expected = _step("ddim", "triton", drawn, guidance_scale=2.0, guidance_rescale=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        late = {name: value + 0 for name, value in drawn.items()}
        found = _step("ddim", "triton", late, guidance_scale=2.0, guidance_rescale=0.5)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    shape = (3, 16, 8192, 5600)
    sample, output = (torch.randn(shape, device=DEVICE, dtype=torch.float16) for _ in range(2))
    assert sample.numel() > 2**31
    packed = _coefficients("ddim")
    options: dict[str, Any] = {"offset": 9, "return_original": False}
    with ops.backend("triton"):
        found = ops.ddim_step(
            sample, output, packed, seed=torch.arange(3, device=DEVICE), **options
        )
        alone = ops.ddim_step(
            sample[2:].clone(), output[2:].clone(), packed, seed=2, **options
        )  # fmt: skip
    assert torch.equal(found.prev_sample[2:], alone.prev_sample)
