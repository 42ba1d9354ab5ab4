"""The Triton kernels of the sampling steps, in the interpreter where there is no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastldm import ops
from fastldm.ops.diffusion_step import triton_kernel
from fastldm.ops.diffusion_step.reference import normal_of_blocks
from fastldm.ops.diffusion_step.triton_noise import normal_blocks, normal_elements

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
STEPS = {"ddim": ops.ddim_step, "ddpm": ops.ddpm_step}
SHAPE = (2, 4, 6, 5)
ALPHA, ALPHA_PREV = torch.tensor(0.4), torch.tensor(0.7)
LIMITS: list[dict[str, Any]] = [{}, {"clip_range": 0.8}, {"threshold": torch.tensor([1.0, 1.7])}]
GUIDANCE: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 7.5},
    {"guidance_scale": torch.tensor([3.0, 9.0])},
    {"guidance_scale": torch.tensor(4.0), "guidance_rescale": 0.7},
]
NOISE = ["none", "given", "drawn"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second column": lambda x: torch.stack((x, x), dim=-1).flatten(-2)[..., ::2],
    "not at a vector": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "expanded": lambda x: x[:, :1, :1].expand(x.shape),
}


def _coefficients(op: str, variance_type: str = "fixed_small") -> Tensor:
    if op == "ddim":
        return ops.ddim_coefficients(ALPHA, ALPHA_PREV, 0.6)
    return ops.ddpm_coefficients(ALPHA, ALPHA_PREV, variance_type)


def _draw(shape: tuple[int, ...], dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in names}


def _step(op: str, backend: str, device: str, *operands: Tensor, **options: Any) -> list[Tensor]:
    """Both results; one sample on the device of the kernels, the other on the CPU."""
    place = device if backend == "triton" else "cpu"
    given = {
        name: value.to(place) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    with ops.backend(backend):
        return list(STEPS[op](*(operand.to(place) for operand in operands), **given))


def _kinds(op: str) -> list[dict[str, Any]]:
    kinds: list[dict[str, Any]] = [
        {"prediction_type": kind} for kind in ("epsilon", "sample", "v_prediction")
    ]
    if op == "ddim":
        return [{**kind, "use_clipped_model_output": c} for kind in kinds for c in (False, True)]
    return [*kinds, *({"variance_type": kind} for kind in ("learned", "learned_range"))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("guidance", GUIDANCE, ids=["none", "one", "by sample", "rescaled"])
def test_error_is_at_most_twice_that_of_plain_pytorch(
    op: str,
    noise: str,
    guidance: dict[str, Any],
    dtype: torch.dtype,
    assert_accurate: Any,
    triton_device: str,
) -> None:
    """Every prediction type, limit and variance, in float64 by the tested reference.

    Every pair of them without noise, and each limit in turn with it.
    """
    names = ["sample", "output", "noise", "predicted_variance", "model_output_uncond"]
    drawn = _draw(SHAPE, dtype, *names)
    pairs = itertools.product(_kinds(op), LIMITS)
    if noise != "none":
        pairs = zip(_kinds(op), itertools.cycle(LIMITS), strict=False)
    for kind, limit in pairs:
        options = {**kind, **limit, **guidance}
        if guidance:
            options["model_output_uncond"] = drawn["model_output_uncond"]
        if noise == "given":
            options["noise"] = drawn["noise"]
        elif noise == "drawn":
            options["seed"], options["offset"] = 7, 3
        if "variance_type" in kind:
            options["predicted_variance"] = drawn["predicted_variance"].sigmoid()
        operands = (drawn["sample"], drawn["output"])
        packed = _coefficients(op, kind.get("variance_type", "fixed_small"))
        actual = _step(op, "triton", triton_device, *operands, packed, **options)
        exact = _step(
            op, "reference", "cpu", *_double(operands), packed.double(), **_double(options)
        )
        plain = _step(op, "reference", "cpu", *operands, packed, **options)
        for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
            assert got.dtype == dtype
            assert_accurate(got.cpu(), same_dtype, truth)


def _double(values: Any) -> Any:
    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    if isinstance(values, dict):
        return {name: widen(value) for name, value in values.items()}
    return tuple(widen(value) for value in values)


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts_and_the_bits_of_the_reference(
    op: str, layout: str, other: str, triton_device: str
) -> None:
    """Strides are those of the sample, and the noise is numbered in row-major order."""
    drawn = _draw(SHAPE, torch.float32, "sample", "output", "model_output_uncond")
    drawn = {name: LAYOUTS[other](value) for name, value in drawn.items()}
    sample, output = LAYOUTS[layout](drawn.pop("sample")), drawn.pop("output")
    for seed in (5, torch.tensor([3, -(2**40)])):
        options = {**drawn, "guidance_scale": 3.0, "seed": seed, "offset": 2**33 + 1}
        packed = _coefficients(op)
        found = _step(op, "triton", triton_device, sample, output, packed, **options)
        expected = _step(op, "reference", "cpu", sample, output, packed, **options)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got.cpu(), want)
            assert got.stride() == torch.empty_like(sample).stride()


@pytest.mark.parametrize(
    "shape", [(3,), (2, 7), (1, 1), (3, 5, 1, 1), (2, 3, 2, 3, 2), (1, 2, 4099)]
)
@pytest.mark.parametrize("seeds", [1, "a sample"])
def test_any_rank_and_size(shape: tuple[int, ...], seeds: Any, triton_device: str) -> None:
    """Also where a sample does not begin at a Philox block, or takes several programs."""
    drawn = _draw(shape, torch.float32, "sample", "output")
    seed = torch.arange(shape[0]) if seeds == "a sample" else torch.tensor([11])
    arguments = (*drawn.values(), _coefficients("ddim"))
    found, expected = (
        _step("ddim", name, triton_device, *arguments, seed=seed, offset=9)
        for name in ("triton", "reference")
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@triton.jit
def _normal_kernel(block_ptr, seed_ptr, offset_ptr, by_block_ptr, by_element_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    first, seed, offset = tl.load(block_ptr), tl.load(seed_ptr), tl.load(offset_ptr)
    i = tl.arange(0, 4 * N)
    tl.store(by_block_ptr + i, normal_blocks(first + tl.arange(0, N), seed, offset))
    tl.store(by_element_ptr + i, normal_elements(4 * first + i, seed, offset))


@pytest.mark.parametrize("first", [0, 2**32 - 8, 2**40 + 3])
def test_normal_numbers_far_out(first: int, triton_device: str) -> None:
    """In tensors of more elements than any test can have."""
    state = [torch.tensor(value, device=triton_device) for value in (first, 5 - 2**40, 2**33 + 1)]
    by_block, by_element = torch.empty(2, 64, device=triton_device).unbind()
    _normal_kernel[(1,)](*state, by_block, by_element, N=16, enable_fp_fusion=False)
    block, seed, offset = (value.cpu() for value in state)
    expected = normal_of_blocks((block + torch.arange(16)).view(1, -1), seed.view(1, 1), offset)
    assert torch.equal(by_block.cpu(), expected[0])
    assert torch.equal(by_element.cpu(), expected[0])


@pytest.mark.parametrize("op", STEPS)
def test_no_samples(op: str, triton_device: str) -> None:
    nothing = torch.zeros(0, 4, 2, 2)
    found = _step(op, "triton", triton_device, nothing, nothing, _coefficients(op), seed=1)
    assert [value.shape for value in found] == [(0, 4, 2, 2)] * 2


@pytest.mark.parametrize("count", [3, 40, 128, 700])
def test_rescaling_joins_the_moments_of_pieces(
    count: int, assert_accurate: Any, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around a mean far from zero, where a sum of squares would leave nothing."""
    monkeypatch.setattr(triton_kernel, "MOMENTS_BLOCK", 16)
    monkeypatch.setattr(triton_kernel, "MOST_PIECES", 8)
    drawn = _draw((2, count), torch.float32, "sample", "output", "model_output_uncond")
    drawn["output"] += 3000
    drawn["model_output_uncond"] += 3000
    options = {"guidance_scale": 5.0, "guidance_rescale": 0.5}
    arguments = (drawn.pop("sample"), drawn.pop("output"), _coefficients("ddim"))
    actual = _step("ddim", "triton", triton_device, *arguments, **drawn, **options)
    plain = _step("ddim", "reference", "cpu", *arguments, **drawn, **options)
    exact = _step("ddim", "reference", "cpu", *_double(arguments), **_double(drawn), **options)
    for got, same_dtype, truth in zip(actual, plain, exact, strict=True):
        assert_accurate(got.cpu(), same_dtype, truth)


@pytest.mark.parametrize("layout", ["contiguous", "batch innermost"])
def test_the_original_need_not_be_written(layout: str, triton_device: str) -> None:
    drawn = _draw((2, 3, 4, 5), torch.float32, "sample", "output")
    arguments = (LAYOUTS[layout](drawn["sample"]), drawn["output"], _coefficients("ddim"))
    both = _step("ddim", "triton", triton_device, *arguments)
    previous, original = _step("ddim", "triton", triton_device, *arguments, return_original=False)
    assert torch.equal(previous, both[0])
    assert original.shape == (0,)


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("return_original", [True, False])
def test_raw_operator_keeps_its_contract(
    op: str, return_original: bool, triton_device: str
) -> None:
    drawn = _draw(SHAPE, torch.float32, "sample", "output", "uncond").values()
    sample, output, uncond = (value.to(triton_device) for value in drawn)
    specific: dict[str, Any] = {"use_clipped_model_output": False}
    if op == "ddpm":
        specific = {"variance_type": "fixed_small", "predicted_variance": None}
    torch.library.opcheck(
        getattr(torch.ops.fastldm, f"{op}_step_fwd").default,
        (LAYOUTS["channels_last"](sample), output, _coefficients(op).to(triton_device)),
        {
            "prediction_type": "epsilon", "clip_range": 1.0, "threshold": None,
            "model_output_uncond": uncond, "guidance_scale": 2.0, "guidance_scales": None,
            "guidance_rescale": 0.5, "noise": None, "seed": torch.tensor([3], device=triton_device),
            "offset": torch.tensor(1, device=triton_device), "return_original": return_original,
            "backend": "triton", **specific,
        },
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


@pytest.mark.parametrize("op", STEPS)
def test_time_steps_may_differ_within_a_batch(op: str, triton_device: str) -> None:
    alpha, alpha_prev = torch.tensor([0.2, 0.6]), torch.tensor([0.5, 0.9])
    make = ops.ddim_coefficients if op == "ddim" else ops.ddpm_coefficients
    rows = make(alpha, alpha_prev).double()
    drawn = _draw(SHAPE, torch.float32, "sample", "output", "noise")
    sample, output, noise = drawn.values()
    # Of a schedule's table, every second row; the scalars are float64, as a schedule has them.
    table = rows.repeat_interleave(2, dim=0)[::2]
    found = _step(op, "triton", triton_device, sample, output, table, noise=noise)
    expected = _step(op, "reference", "cpu", sample, output, rows, noise=noise)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_nan_and_infinity_stay_where_they_are(limit: dict[str, Any], triton_device: str) -> None:
    drawn = _draw(SHAPE, torch.float32, "sample", "output")
    drawn["sample"][0, 0, 0, 0] = torch.nan
    drawn["output"][1, 2, 3, 4] = torch.inf
    arguments = (*drawn.values(), _coefficients("ddim"))
    found, expected = (
        _step("ddim", name, triton_device, *arguments, **limit) for name in ("triton", "reference")
    )
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got.cpu().nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 7), (2, 4096)], ids=str)
def test_every_element_is_written_and_nothing_else(
    shape: tuple[int, ...], triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda x: x.new_empty(x.shape))
    drawn = _draw(shape, torch.float16, "sample", "output", "model_output_uncond")
    sample, output, uncond = drawn.values()
    options = {"model_output_uncond": uncond, "guidance_scale": 3.0, "guidance_rescale": 0.5}
    for result in _step(
        "ddim", "triton", triton_device, sample, output, _coefficients("ddim"), seed=1, **options
    ):
        assert result.isfinite().all()


def test_a_wanted_gradient_is_the_references(triton_device: str) -> None:
    drawn = _draw(SHAPE, torch.float32, "sample", "output", "upstream")
    sample, output, upstream = drawn.values()
    gradients = []
    for name in ("triton", "reference"):
        leaf = output.clone().requires_grad_()
        found, _ = _step("ddim", name, triton_device, sample, leaf, _coefficients("ddim"), seed=1)
        gradients += torch.autograd.grad(found, leaf, upstream.to(found.device))
    assert torch.equal(*gradients)


def test_one_compiled_step_serves_every_time_step(triton_device: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    table = ops.ddim_coefficients(torch.linspace(0.1, 0.8, 5), torch.linspace(0.2, 0.9, 5), 0.5)
    table = table.to(triton_device)

    def step(sample: Tensor, output: Tensor, row: Tensor, offset: Tensor) -> Tensor:
        return ops.ddim_step(sample, output, row, seed=1, offset=offset).prev_sample

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    with ops.backend("triton"):
        for index, batch in enumerate([2, 3, 5]):
            drawn = _draw((batch, 4, 6, 6), torch.float32, "sample", "output")
            arguments = [value.to(triton_device) for value in (*drawn.values(), table[index])]
            offset = torch.tensor(index, device=triton_device)
            assert torch.equal(compiled(*arguments, offset), step(*arguments, offset))
    assert len(graphs) == 1


@pytest.mark.parametrize("stride", [(2**30, 20, 5, 1), (20, 2**30, 5, 1)], ids=str)
def test_offsets_beyond_32_bits(
    stride: tuple[int, ...], triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model output that lies far apart; the pages between are never touched."""
    if triton_device == "cpu":
        from triton.runtime import interpreter

        # It would copy every argument's storage onto itself.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    sample, output = _draw((3, 4, 4, 5), torch.float16, "sample", "output").values()
    # The strides fit into 32 bits, the offsets do not.
    furthest = sum((size - 1) * step for size, step in zip(output.shape, stride, strict=True))
    assert furthest >= 2**31
    far = torch.empty(furthest + 1, dtype=torch.float16, device=triton_device)
    far = far.as_strided(output.shape, stride).copy_(output)
    found, expected = (
        _step("ddim", "triton", triton_device, sample, value, _coefficients("ddim"))
        for value in (far, output)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
