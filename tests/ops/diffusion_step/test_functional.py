"""`ddim_step` and `ddpm_step` against the papers' formulas, written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.errors import BackendUnavailableError, ConfigError
from fastldm.ops import (
    _extension,
    backend,
    ddim_coefficients,
    ddim_step,
    ddpm_coefficients,
    ddpm_step,
    dynamic_threshold,
    explain,
    predict_original_sample,
)
from fastldm.ops.diffusion_step.reference import philox_normal

SHAPE = (2, 4, 6, 5)
ALPHA, ALPHA_PREV, ETA = 0.4, 0.7, 0.6
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
VARIANCE_TYPES = ["fixed_small", "fixed_large", "learned", "learned_range"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def draw(*names: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        for name in names
    }
    if "predicted_variance" in values:
        values["predicted_variance"] = values["predicted_variance"].sigmoid()
    return values


def coefficients(op: str, dtype: torch.dtype, variance_type: str = "fixed_small") -> Tensor:
    alpha, alpha_prev = (torch.tensor(a, dtype=torch.float64) for a in (ALPHA, ALPHA_PREV))
    if op == "ddim":
        return ddim_coefficients(alpha, alpha_prev, ETA).to(dtype)
    return ddpm_coefficients(alpha, alpha_prev, variance_type).to(dtype)


def expected_original(x: Tensor, out: Tensor, prediction_type: str) -> Tensor:
    if prediction_type == "epsilon":
        return (x - math.sqrt(1 - ALPHA) * out) / math.sqrt(ALPHA)
    if prediction_type == "v_prediction":
        return math.sqrt(ALPHA) * x - math.sqrt(1 - ALPHA) * out
    return out


def expected_limited(original: Tensor, options: dict[str, Any]) -> Tensor:
    if options.get("threshold") is not None:
        bound = options["threshold"].to(original.dtype).reshape(-1, 1, 1, 1)
        return torch.maximum(torch.minimum(original, bound), -bound) / bound
    if options.get("clip_range") is not None:
        return original.clip(-options["clip_range"], options["clip_range"])
    return original


def expected_output(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    cond, uncond = tensors["model_output"], tensors.get("model_output_uncond")
    if uncond is None:
        return cond
    scale = options.get("guidance_scale", 1.0)
    if isinstance(scale, Tensor):
        scale = scale.to(cond.dtype).reshape(-1, 1, 1, 1)
    guided = uncond + scale * (cond - uncond)
    phi = options.get("guidance_rescale", 0.0)
    deviation = [value.std((1, 2, 3), keepdim=True) for value in (cond, guided)]
    return phi * guided * deviation[0] / deviation[1] + (1 - phi) * guided


def expected_ddim(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """DDIM, 2010.02502 eq. 12 and 16, in the dtype of the tensors."""
    x, out = tensors["sample"], expected_output(tensors, options)
    kind = options.get("prediction_type", "epsilon")
    original = expected_original(x, out, kind)
    limited = expected_limited(original, options)
    source = limited if options.get("use_clipped_model_output") else original
    epsilon = (x - math.sqrt(ALPHA) * source) / math.sqrt(1 - ALPHA)
    sigma = ETA * math.sqrt((1 - ALPHA_PREV) / (1 - ALPHA) * (1 - ALPHA / ALPHA_PREV))
    previous = math.sqrt(ALPHA_PREV) * limited + math.sqrt(1 - ALPHA_PREV - sigma**2) * epsilon
    if "noise" in tensors:
        previous = previous + sigma * tensors["noise"]
    return previous, limited


def expected_ddpm(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """DDPM, 2006.11239 eq. 7, in the dtype of the tensors."""
    x, out = tensors["sample"], expected_output(tensors, options)
    kind = options.get("prediction_type", "epsilon")
    limited = expected_limited(expected_original(x, out, kind), options)
    beta = 1 - ALPHA / ALPHA_PREV
    small = (1 - ALPHA_PREV) / (1 - ALPHA) * beta
    previous = math.sqrt(ALPHA_PREV) * beta / (1 - ALPHA) * limited
    previous = previous + math.sqrt(1 - beta) * (1 - ALPHA_PREV) / (1 - ALPHA) * x
    if "noise" in tensors:
        variance_type = options.get("variance_type", "fixed_small")
        variance: Any = {"fixed_small": small, "fixed_large": beta}.get(variance_type)
        if variance_type == "learned":
            variance = tensors["predicted_variance"]
        elif variance_type == "learned_range":
            fraction = (tensors["predicted_variance"] + 1) / 2
            variance = beta**fraction * small ** (1 - fraction)
        previous = previous + variance**0.5 * tensors["noise"]
    return previous, limited


def run(op: str, tensors: dict[str, Tensor], **options: Any) -> Any:
    tensors = dict(tensors)
    sample, output = tensors.pop("sample"), tensors.pop("model_output")
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    packed = coefficients(op, dtype, options.get("variance_type", "fixed_small"))
    step = ddim_step if op == "ddim" else ddpm_step
    return step(sample, output, packed, **tensors, **options)


def expected(op: str, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return (expected_ddim if op == "ddim" else expected_ddpm)(tensors, **options)


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    **{
        f"{op}-{kind}": (op, ("sample", "model_output", "noise"), {"prediction_type": kind})
        for op in ("ddim", "ddpm")
        for kind in PREDICTION_TYPES
    },
    **{
        f"{op}-{kind}-clip": (
            op, ("sample", "model_output"), {"prediction_type": kind, "clip_range": 0.8},
        )
        for op in ("ddim", "ddpm")
        for kind in PREDICTION_TYPES
    },
    **{
        f"ddim-{kind}-rederived": (
            "ddim",
            ("sample", "model_output"),
            {"prediction_type": kind, "clip_range": 0.8, "use_clipped_model_output": True},
        )
        for kind in PREDICTION_TYPES
    },
    **{
        f"{op}-threshold": (
            op, ("sample", "model_output", "noise"), {"threshold": torch.tensor([1.0, 1.7])},
        )
        for op in ("ddim", "ddpm")
    },
    **{
        f"{op}-guided": (
            op,
            ("sample", "model_output", "model_output_uncond", "noise"),
            {"guidance_scale": 7.5, "prediction_type": "v_prediction"},
        )
        for op in ("ddim", "ddpm")
    },
    **{
        f"{op}-guided-rescaled": (
            op,
            ("sample", "model_output", "model_output_uncond"),
            {"guidance_scale": torch.tensor([3.0, 9.0]), "guidance_rescale": 0.7},
        )
        for op in ("ddim", "ddpm")
    },
    **{
        f"ddpm-{kind}": (
            "ddpm",
            ("sample", "model_output", "noise", "predicted_variance"),
            {"variance_type": kind},
        )
        for kind in VARIANCE_TYPES
    },
}  # fmt: skip


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def served_by(request):
    """Every test runs on each backend that has a kernel for the CPU."""
    if request.param == "cpp" and _extension.problem():
        pytest.skip(_extension.problem())
    with backend(request.param):
        yield request.param


@pytest.fixture
def dynamo():
    """Compiled code of other tests counts towards a limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_float64_is_the_formula(case):
    op, names, options = CASES[case]
    tensors = draw(*names)
    result = run(op, tensors, **options)
    for got, want in zip(result, expected(op, tensors, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case, dtype):
    op, names, options = CASES[case]
    tensors = draw(*names, dtype=dtype)
    truth = expected(op, {name: value.double() for name, value in tensors.items()}, **options)
    plain = expected(op, tensors, **options)
    result = run(op, tensors, **options)
    for got, want, same_dtype in zip(result, truth, plain, strict=True):
        assert got.dtype == dtype
        ulp = torch.finfo(dtype).eps * float(want.abs().max())
        allowed = 2 * float((same_dtype.double() - want).abs().max()) + 2 * ulp
        assert float((got.double() - want).abs().max()) <= allowed


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_strides_of_the_sample_are_kept(op, layout, other):
    tensors = draw("sample", "model_output", "noise")
    plain = run(op, tensors, clip_range=1.0)
    arranged = {name: LAYOUTS[other](value) for name, value in tensors.items()}
    arranged["sample"] = LAYOUTS[layout](tensors["sample"])
    for got, want in zip(run(op, arranged, clip_range=1.0), plain, strict=True):
        assert torch.equal(got, want)
        assert got.stride() == torch.empty_like(arranged["sample"]).stride()


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
def test_outputs_are_memory_of_their_own(op):
    tensors = draw("sample", "model_output")
    previous, original = run(op, tensors, prediction_type="sample")
    before = tensors["model_output"].clone()
    original.fill_(7.0)
    previous.fill_(7.0)
    assert torch.equal(tensors["model_output"], before)


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_original_need_not_be_given(op, gradient):
    tensors = draw("sample", "model_output", "noise", dtype=torch.float32)
    tensors["sample"] = tensors["sample"].transpose(2, 3).requires_grad_(gradient)
    tensors["noise"], tensors["model_output"] = tensors["noise"].mT, tensors["model_output"].mT
    both = run(op, tensors)
    one = run(op, tensors, return_original=False)
    assert both.pred_original_sample.shape == SHAPE[:2] + SHAPE[:1:-1]
    assert one.pred_original_sample.shape == (0,)
    assert torch.equal(one.prev_sample, both.prev_sample)
    assert one.prev_sample.requires_grad == gradient


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
def test_time_steps_may_differ_within_a_batch(op):
    tensors = draw("sample", "model_output", "noise")
    alpha = torch.tensor([0.2, 0.6], dtype=torch.float64)
    alpha_prev = torch.tensor([0.5, 0.9], dtype=torch.float64)
    make, step = {"ddim": (ddim_coefficients, ddim_step), "ddpm": (ddpm_coefficients, ddpm_step)}[
        op
    ]
    rows = make(alpha, alpha_prev)
    sample, output, noise = tensors.values()
    together = step(sample, output, rows, noise=noise)
    for row in range(2):
        one = slice(row, row + 1)
        alone = step(sample[one], output[one], rows[row], noise=noise[one])
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got[one], want)


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("shape", [(3,), (3, 7), (0, 4, 2, 2), (2, 4, 1, 1), (2, 3, 2, 2, 2)])
def test_any_rank_and_size(op, shape):
    sample, output, noise = torch.randn(3, *shape, dtype=torch.float64).unbind()
    packed = coefficients(op, torch.float64)
    step = ddim_step if op == "ddim" else ddpm_step
    previous, original = step(sample, output, packed, noise=noise)
    tensors = {"sample": sample, "model_output": output, "noise": noise}
    want = expected(op, tensors)
    torch.testing.assert_close(previous, want[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(original, want[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
def test_nan_and_infinity_stay_where_they_are(op):
    tensors = draw("sample", "model_output", dtype=torch.float32)
    tensors["sample"][0, 0, 0, 0] = float("nan")
    tensors["model_output"][1, 2, 3, 4] = float("inf")
    result = run(op, tensors, clip_range=1.0)
    for got, want in zip(result, expected(op, tensors, clip_range=1.0), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("seed", [3, -1, 2**63, 2**64 - 1, torch.tensor([5, 2**40])], ids=str)
def test_a_seed_is_the_noise_that_philox_gives(op, seed):
    tensors = draw("sample", "model_output", dtype=torch.float32)
    as_signed = seed if isinstance(seed, Tensor) else (seed + 2**63) % 2**64 - 2**63
    rows = torch.as_tensor(as_signed).reshape(-1)
    noise = philox_normal(torch.Size(SHAPE), torch.float32, rows, torch.tensor(11))
    drawn = run(op, tensors, seed=seed, offset=11)
    given = run(op, {**tensors, "noise": noise})
    again = run(op, tensors, seed=seed, offset=torch.tensor(11))
    other = run(op, tensors, seed=seed, offset=12)
    assert torch.equal(drawn.prev_sample, given.prev_sample)
    assert torch.equal(drawn.prev_sample, again.prev_sample)
    assert not torch.equal(drawn.prev_sample, other.prev_sample)


@every_case
def test_gradients_are_those_of_the_formula(case):
    op, names, options = CASES[case]
    tensors = {name: value.requires_grad_() for name, value in draw(*names).items()}
    upstream = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    inputs = list(tensors.values())
    got = torch.autograd.grad(
        tuple(run(op, tensors, **options)), inputs, upstream, allow_unused=True
    )
    want = torch.autograd.grad(
        expected(op, tensors, **options), inputs, upstream, allow_unused=True
    )
    for name, one, other in zip(names, got, want, strict=True):
        if other is None:
            assert one is None, name
        else:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        "ddim-epsilon", "ddim-v_prediction-rederived", "ddim-threshold", "ddim-guided-rescaled",
        "ddpm-sample-clip", "ddpm-guided", "ddpm-learned_range",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("gradient", [False, True])
def test_compiles_without_a_break(case, gradient):
    op, names, options = CASES[case]
    tensors = draw(*names, dtype=torch.float32)
    tensors["sample"].requires_grad_(gradient)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(op, tensors, **options), run(op, tensors, **options), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert got.stride() == want.stride()
        assert got.requires_grad == want.requires_grad


@pytest.mark.usefixtures("dynamo")
def test_one_compiled_step_serves_every_time_step_and_batch_size():
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    table = ddim_coefficients(torch.linspace(0.1, 0.8, 5), torch.linspace(0.2, 0.9, 5), 0.5)

    def step(sample: Tensor, output: Tensor, row: Tensor, offset: Tensor) -> Tensor:
        return ddim_step(sample, output, row, clip_range=1.0, seed=1, offset=offset).prev_sample

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for index, batch in enumerate([2, 3, 5, 4, 7]):
        sample, output = torch.randn(batch, 4, 6, 6), torch.randn(batch, 4, 6, 6)
        offset = torch.tensor(index)
        got = compiled(sample, output, table[index], offset)
        assert torch.equal(got, step(sample, output, table[index], offset))
    assert len(graphs) == 1


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("return_original", [True, False])
def test_raw_operator_keeps_its_contract(op, return_original, served_by):
    tensors = draw("sample", "model_output", "noise", dtype=torch.float32)
    raw = torch.ops.fastldm.ddim_step_fwd if op == "ddim" else torch.ops.fastldm.ddpm_step_fwd
    specific: dict[str, Any] = {"use_clipped_model_output": False}
    if op == "ddpm":
        specific = {"variance_type": "fixed_small", "predicted_variance": None}
    torch.library.opcheck(
        raw.default,
        (tensors["sample"].contiguous(memory_format=torch.channels_last), tensors["model_output"],
         coefficients(op, torch.float32)),
        {
            "prediction_type": "epsilon", "clip_range": 1.0, "threshold": None,
            "model_output_uncond": tensors["noise"], "guidance_scale": 2.0,
            "guidance_scales": None, "guidance_rescale": 0.5, "noise": None,
            "seed": torch.tensor([3]), "offset": torch.tensor(1),
            "return_original": return_original, "backend": served_by, **specific,
        },
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_original_sample_before_limits():
    tensors = draw("sample", "model_output", "model_output_uncond", dtype=torch.float32)
    for op in ("ddim", "ddpm"):
        for kind in PREDICTION_TYPES:
            got = predict_original_sample(
                tensors["sample"],
                tensors["model_output"],
                coefficients(op, torch.float32),
                prediction_type=kind,
                model_output_uncond=tensors["model_output_uncond"],
                guidance_scale=4.0,
            )
            out = expected_output(tensors, {"guidance_scale": 4.0})
            want = expected_original(tensors["sample"], out, kind)
            torch.testing.assert_close(got, want)


def test_dynamic_threshold_is_the_clamped_quantile(monkeypatch):
    original = torch.randn(3, 4, 5, 5, dtype=torch.float64) * torch.tensor(
        [0.1, 1.0, 9.0], dtype=torch.float64
    ).reshape(3, 1, 1, 1)
    ordered = original.abs().flatten(1).sort(1).values
    position = 0.9 * 99
    below, above = ordered[:, math.floor(position)], ordered[:, math.ceil(position)]
    want = torch.lerp(below, above, position - math.floor(position)).clamp(1, 5)
    assert want[0] == 1
    assert want[2] == 5
    torch.testing.assert_close(dynamic_threshold(original, 0.9, 5.0), want)
    monkeypatch.setattr("fastldm.ops.diffusion_step.functional._QUANTILE_LIMIT", 10)
    torch.testing.assert_close(dynamic_threshold(original, 0.9, 5.0), want)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "integer sample": ("sample", {"sample": torch.zeros(SHAPE, dtype=torch.int64)}),
    "scalar sample": ("sample", {"sample": torch.tensor(1.0)}),
    "output of another shape": ("model_output", {"model_output": torch.zeros(2, 4, 6, 6)}),
    "integer output": ("model_output", {"model_output": torch.zeros(SHAPE, dtype=torch.int32)}),
    "output elsewhere": ("model_output", {"model_output": torch.zeros(SHAPE, device="meta")}),
    "uncond of another shape": ("model_output_uncond", {"model_output_uncond": torch.zeros(2, 4)}),
    "noise of another shape": ("noise", {"noise": torch.zeros(1, 4, 6, 5)}),
    "too many coefficients": ("coefficients", {"coefficients": torch.zeros(9)}),
    "coefficients of a larger batch": ("coefficients", {"coefficients": torch.zeros(3, 5)}),
    "threshold for one": ("threshold", {"threshold": torch.ones(1)}),
    "both limits": ("threshold", {"threshold": torch.ones(2), "clip_range": 1.0}),
    "scale of a larger batch": ("guidance_scale", {"guidance_scale": torch.ones(3)}),
    "unknown prediction": ("prediction_type.*'flow'.*epsilon", {"prediction_type": "flow"}),
    "two noises": ("seed", {"noise": torch.zeros(SHAPE), "seed": 1}),
    "seeds of a larger batch": ("seed", {"seed": torch.tensor([1, 2, 3])}),
    "seed of another dtype": ("seed", {"seed": torch.tensor([1.0])}),
    "vector of offsets": ("offset", {"seed": 1, "offset": torch.tensor([1, 2])}),
}


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_named(op, wrong):
    message, changed = WRONG[wrong]
    arguments: dict[str, Any] = {
        "sample": torch.zeros(SHAPE),
        "model_output": torch.zeros(SHAPE),
        "coefficients": coefficients(op, torch.float32),
        **changed,
    }
    with pytest.raises(ConfigError, match=message):
        (ddim_step if op == "ddim" else ddpm_step)(**arguments)


@pytest.mark.parametrize("op", ["ddim", "ddpm"])
def test_backend_is_the_one_asked_for(op):
    tensors = draw("sample", "model_output")
    plain = run(op, tensors)
    with backend("reference"):
        assert torch.equal(run(op, tensors).prev_sample, plain.prev_sample)
    with backend("triton"), pytest.raises(BackendUnavailableError, match=f"{op}_step"):
        run(op, tensors)
    packed = coefficients(op, torch.float64)
    operands = (tensors["sample"], tensors["model_output"], packed)
    report = explain(f"{op}_step", *operands, seed=torch.tensor(3), offset=1)
    assert "reference: can serve" in report
    assert "no kernel for an operand" not in report
    assert "cpp: no kernel for an operand of torch.float8_e5m2" in explain(
        f"{op}_step", tensors["sample"], tensors["model_output"].to(torch.float8_e5m2), packed
    )


def test_bad_variance_is_named():
    zeros, packed = torch.zeros(SHAPE), coefficients("ddpm", torch.float32)
    with pytest.raises(ConfigError, match=r"variance_type.*'huge'.*fixed_large"):
        ddpm_step(zeros, zeros, packed, variance_type="huge")
    with pytest.raises(ConfigError, match="predicted_variance"):
        ddpm_step(zeros, zeros, packed, variance_type="learned", noise=zeros)
    with pytest.raises(ConfigError, match="predicted_variance"):
        ddpm_step(zeros, zeros, packed, predicted_variance=torch.zeros(2, 3))
