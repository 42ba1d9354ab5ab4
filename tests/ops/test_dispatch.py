"""Which backend serves a call, how it is asked for and explained, and what a fallback says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.errors import BackendUnavailableError, ConfigError
from fastldm.ops import _dispatch, _extension, _triton

needs_extension = pytest.mark.skipif(
    _extension.problem() is not None, reason=str(_extension.problem())
)


@pytest.fixture
def broken_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    reason = "the extension fastldm._C cannot be loaded (made up)"
    monkeypatch.setattr(_extension, "_load", lambda: (None, reason))
    monkeypatch.setattr(_dispatch, "_reported", set())
    yield reason
    torch._dynamo.reset()


@pytest.fixture
def lookup() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4, 4), torch.randn(7, 3)


@needs_extension
def test_the_extension_serves_lookups_on_the_cpu(
    lookup: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _dispatch.choose("vector_quantize", *lookup) == "cpp"
    called = []
    module = _extension.extension()
    monkeypatch.setattr(
        _extension, "_load", lambda: (called.append(True), (module, None))[1]
    )  # fmt: skip
    ops.vector_quantize(*lookup)
    assert called
    called.clear()
    with ops.backend("reference"):
        ops.vector_quantize(*lookup)
    assert not called


def test_without_the_extension_the_reference_serves_and_says_so_once(
    lookup: tuple[Tensor, Tensor], broken_extension: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastldm.ops"):
        for _ in range(3):
            assert ops.vector_quantize(*lookup).indices.shape == (2, 4, 4)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert broken_extension in warnings[0].getMessage()


def test_without_the_extension_a_compiled_call_falls_back_too(
    lookup: tuple[Tensor, Tensor], broken_extension: str
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.vector_quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*lookup).indices, ops.vector_quantize(*lookup).indices)


def test_a_backend_asked_for_by_name_raises_its_reason(
    lookup: tuple[Tensor, Tensor], broken_extension: str
) -> None:
    with (
        ops.backend("cpp"),
        pytest.raises(BackendUnavailableError, match=r"'cpp' cannot serve vector_quantize: .*made"),
    ):
        ops.vector_quantize(*lookup)
    x = torch.zeros(1, 4, 2, 2)
    with ops.backend("triton"):
        with pytest.raises(BackendUnavailableError, match=r"no kernel for x of torch\.float64"):
            ops.group_norm_silu(x.double(), 2)
        with pytest.raises(BackendUnavailableError, match=r"no kernel for q of torch\.float64"):
            ops.cross_attention(*[x.double()] * 3)


def test_triton_serves_the_cpu_in_its_interpreter_alone_and_by_name_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(1, 4, 2, 2)
    reason = "it serves CUDA tensors, x is on cpu"
    monkeypatch.setattr(_triton, "interprets", lambda: True)
    assert _dispatch.why_not("group_norm_silu", "triton", x, 2) == reason
    with ops.backend("triton"):
        assert _dispatch.why_not("group_norm_silu", "triton", x, 2) is None
        monkeypatch.setattr(_triton, "interprets", lambda: False)
        with pytest.raises(BackendUnavailableError, match=reason):
            ops.group_norm_silu(x, 2)


def test_triton_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "interprets", lambda: False)
    monkeypatch.setattr(_triton, "_is_installed", lambda: False)
    assert str(_triton.problem()).startswith("triton is not installed")
    monkeypatch.setattr(_triton, "_is_installed", lambda: True)
    assert _triton.problem() is None
    monkeypatch.setattr(_triton, "interprets", lambda: True)
    assert "TRITON_INTERPRET is set" in str(_triton.problem())


@pytest.mark.parametrize("name", ["triton", "cpp"])
def test_on_meta_a_backend_asked_for_by_name_is_traced(name: str) -> None:
    x = torch.empty(2, 4, 3, 3, device="meta")
    q = torch.empty(2, 6, 1, 8, device="meta")
    with ops.backend(name):
        assert ops.group_norm_silu(x, 2).shape == x.shape
        assert ops.cross_attention(q, q, q).shape == q.shape
    with ops.backend("auto"):
        assert ops.group_norm_silu(x, 2).shape == x.shape


def test_reasons_name_device_and_dtype() -> None:
    meta = torch.zeros(2, 3, device="meta")
    reason = _dispatch.why_not("vector_quantize", "cpp", meta, meta)
    assert reason == "it serves CPU and CUDA tensors, z is on meta"
    narrow = torch.zeros(2, 3).to(torch.float8_e4m3fn)
    reason = _dispatch.why_not("vector_quantize", "cpp", narrow, torch.zeros(2, 3))
    assert reason is not None
    assert "float8" in reason


def test_backend_nests_and_ends_with_its_block() -> None:
    def asked_for() -> str:
        line = ops.explain("cross_attention", *[torch.zeros(1, 1, 1, 1)] * 3).splitlines()[0]
        return line.partition("asked for: ")[2].rstrip(")")

    assert asked_for() == "auto"
    with ops.backend("reference"):
        with ops.backend("cpp"):
            assert asked_for() == "cpp"
        assert asked_for() == "reference"
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(asked_for()))
        thread.start()
        thread.join()
        assert seen == ["auto"]
        with pytest.raises(RuntimeError, match="inside"), ops.backend("cpp"):
            raise RuntimeError("inside")
        assert asked_for() == "reference"
    assert asked_for() == "auto"


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="backend: got 'cuda'; accepted: 'auto', 'triton'"):
        ops.backend("cuda").__enter__()
    with pytest.raises(ConfigError, match="op_name: got 'softmax'; accepted: 'group_norm_silu'"):
        ops.explain("softmax")


def test_explain(lookup: tuple[Tensor, Tensor], broken_extension: str) -> None:
    assert ops.explain("vector_quantize", *lookup).splitlines() == [
        "vector_quantize: served by reference (asked for: auto)",
        "  triton: there is no triton kernel for vector_quantize",
        f"  cpp: {broken_extension}",
        "  reference: can serve",
    ]
    with ops.backend("cpp"):
        first = ops.explain("vector_quantize", *lookup).splitlines()[0]
    assert first == "vector_quantize: not served, it would raise (asked for: cpp)"


@needs_extension
def test_a_compiled_function_follows_the_backend(lookup: tuple[Tensor, Tensor]) -> None:
    torch._dynamo.reset()
    chosen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        chosen.append("cpp" if "backend = 'cpp'" in graph.code else "reference")
        return graph

    compiled = torch.compile(ops.vector_quantize, fullgraph=True, backend=record)
    first = compiled(*lookup)
    with ops.backend("reference"):
        second = compiled(*lookup)
    compiled(*lookup)
    assert chosen == ["cpp", "reference"]
    assert torch.equal(first.indices, second.indices)
