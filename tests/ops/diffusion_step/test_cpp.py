"""The C++ kernel of the sampling steps: the reference's bits, whatever the threads and layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops import _extension, ddim_coefficients, ddim_step, ddpm_coefficients, ddpm_step

pytestmark = pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Several blocks of a sample, the last one short; a sample does not end with a call of Philox.
SHAPE = (3, 3, 19, 23)


@pytest.fixture(autouse=True)
def _served_by_cpp() -> Iterator[None]:
    with ops.backend("cpp"):
        yield


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _step(op: str, sample: Tensor, output: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    alpha, alpha_prev = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.6, 0.7, 0.8])
    if op == "ddim":
        result = ddim_step(sample, output, ddim_coefficients(alpha, alpha_prev, 0.5), **options)
    else:
        kind = options.get("variance_type", "fixed_small")
        rows = ddpm_coefficients(alpha, alpha_prev, kind)
        result = ddpm_step(sample, output, rows, **options)
    return result.prev_sample, result.pred_original_sample


LIMITS: list[dict[str, Any]] = [{}, {"clip_range": 0.7}, {"threshold": torch.tensor([1.0, 2, 1.2])}]
GUIDANCE: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 7.5},
    {"guidance_scale": torch.tensor([1.0, 3.0, 9.0])},
]
NOISE: list[dict[str, Any]] = [
    {}, {"noise": True}, {"seed": 5, "offset": 2**40 + 3}, {"seed": torch.tensor([1, -2, 2**60])},
]  # fmt: skip


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("op", ["ddim", "ddim anew", "ddpm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_reference(dtype: torch.dtype, op: str, prediction: str) -> None:
    sample, output = _draw(*SHAPE, dtype=dtype), _draw(*SHAPE, dtype=dtype, seed=1)
    extra = {"use_clipped_model_output": True} if op == "ddim anew" else {}
    for limits, guidance, noise in itertools.product(LIMITS, GUIDANCE, NOISE):
        options = {"prediction_type": prediction, **limits, **guidance, **noise, **extra}
        if guidance:
            options["model_output_uncond"] = _draw(*SHAPE, dtype=dtype, seed=2)
        if "noise" in options:
            options["noise"] = _draw(*SHAPE, dtype=dtype, seed=3)
        found = _step(op.split()[0], sample, output, **options)
        with ops.backend("reference"):
            expected = _step(op.split()[0], sample, output, **options)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want), options


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "batch inside", "expanded"])
def test_seeds_count_rows_whatever_the_layout(op: str, layout: str) -> None:
    x = _draw(*SHAPE)
    arranged = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": x[:, :1].expand(SHAPE),
    }[layout]
    output = _draw(*SHAPE, seed=1)
    for seed in (9, torch.tensor([4, 5, 6])):
        found = _step(op, arranged, output, seed=seed, offset=2)
        expected = _step(op, arranged.contiguous(), output, seed=seed, offset=2)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
            assert got.stride() == torch.empty_like(arranged).stride()


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(op: str, dtype: torch.dtype) -> None:
    shape = (3, 4, 64, 65)
    sample, output, uncond = (_draw(*shape, dtype=dtype, seed=i) for i in range(3))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(
                _step(
                    op, sample, output, model_output_uncond=uncond, guidance_scale=4.0,
                    guidance_rescale=0.7, seed=3,
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written_and_none_beside(
    op: str, dtype: torch.dtype, padded_memory: Any
) -> None:
    sample, output = _draw(*SHAPE, dtype=dtype), _draw(*SHAPE, dtype=dtype, seed=1)
    sample = sample.contiguous(memory_format=torch.channels_last)
    expected = _step(op, sample, output, seed=1)
    with padded_memory() as memory:
        found = _step(op, sample, output, seed=1)
    assert memory.tensors >= 3  # the outputs, and the noise in the order of the sample
    memory.assert_untouched()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every.reshape(1, -1)
    coefficients = ddim_coefficients(torch.tensor(0.5), torch.tensor(0.6))
    half = ddim_step(torch.zeros_like(every), every, coefficients, prediction_type="sample")
    torch.testing.assert_close(
        half.pred_original_sample, every, rtol=0, atol=0, equal_nan=True
    )  # fmt: skip
    wide = ddim_step(
        torch.zeros(1, 2**16), every, coefficients, prediction_type="sample"
    ).pred_original_sample
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # Between two halves, on the middle and beside it: to the nearest, ties to even.
    ordered = every[every.isfinite()].float().unique()
    middle = (ordered[1:] + ordered[:-1]) / 2
    values = torch.cat(
        [middle, middle.nextafter(ordered[1:]), middle.nextafter(ordered[:-1]), ordered * 1.01]
    ).reshape(1, -1)
    rounded = ddim_step(
        torch.zeros_like(values, dtype=dtype), values, coefficients, prediction_type="sample"
    ).pred_original_sample
    assert torch.equal(rounded, values.to(dtype))


def test_learned_variances_of_other_dtypes() -> None:
    sample, output, noise = (_draw(*SHAPE, seed=i) for i in range(3))
    variance = _draw(*SHAPE, seed=4).sigmoid()
    for kind, dtype in itertools.product(("learned", "learned_range"), DTYPES):
        options = {"variance_type": kind, "predicted_variance": variance.to(dtype), "noise": noise}
        found = _step("ddpm", sample, output.to(dtype), **options)
        with ops.backend("reference"):
            expected = _step("ddpm", sample, output.to(dtype), **options)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 700)], ids=str)
def test_rescaled_guidance_of_few_and_many_elements(shape: tuple[int, ...]) -> None:
    sample, output, uncond = (_draw(*shape, seed=i) for i in range(3))
    coefficients = ddim_coefficients(torch.tensor(0.5), torch.tensor(0.6))
    options: dict[str, Any] = {
        "model_output_uncond": uncond, "guidance_scale": 5.0, "guidance_rescale": 0.6,
    }  # fmt: skip
    found = ddim_step(sample, output, coefficients, **options)
    with ops.backend("reference"):
        expected = ddim_step(sample, output, coefficients, **options)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=2e-6, atol=2e-6, equal_nan=True)


REFUSED: dict[str, dict[str, Any]] = {
    "coefficients of a larger batch": {"coefficients": torch.zeros(4, 5)},
    "integer coefficients": {"coefficients": torch.zeros(5, dtype=torch.int64)},
    "a threshold for two": {"threshold": torch.ones(2)},
    "a threshold beside a range": {"threshold": torch.ones(3), "clip_range": 1.0},
    "scales for two": {"guidance_scales": torch.ones(2)},
    "seeds for two": {"seed": torch.tensor([1, 2]), "offset": torch.tensor(0)},
    "a seed without offset": {"seed": torch.tensor([1])},
    "a seed beside noise": {
        "seed": torch.tensor([1]), "offset": torch.tensor(0), "noise": torch.zeros(SHAPE),
    },
    "an output of another shape": {"model_output_uncond": torch.zeros(3, 4, 19, 16)},
    "an integer output": {"model_output_uncond": torch.zeros(SHAPE, dtype=torch.int32)},
    "an unknown prediction": {"prediction_type": "flow"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_kernel_itself_refuses(name: str) -> None:
    """A good call reaches it without any check before."""
    options: dict[str, Any] = {
        "prediction_type": "epsilon", "clip_range": None, "threshold": None,
        "use_clipped_model_output": False, "model_output_uncond": None, "guidance_scale": 1.0,
        "guidance_scales": None, "guidance_rescale": 0.0, "noise": None, "seed": None,
        "offset": None, "return_original": True, **REFUSED[name],
    }  # fmt: skip
    coefficients = options.pop("coefficients", torch.ones(5))
    images = torch.zeros(SHAPE), torch.zeros(SHAPE)
    with pytest.raises(RuntimeError):
        torch.ops.fastldm.ddim_step_fwd(*images, coefficients, backend="cpp", **options)
