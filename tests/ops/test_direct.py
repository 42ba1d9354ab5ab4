"""When a kernel may be called past torch's dispatcher: only where nobody listens to it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastldm import ops
from fastldm.ops import _direct, _extension

may_call_kernel = functools.partial(_direct.may_call_kernel, backend="reference")


class _Subclass(torch.Tensor):
    pass


def _seen_by(transform: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], object]]) -> bool:
    """What `may_call_kernel` says inside a function that is transformed and called."""
    answers: list[bool] = []

    def function(x: Tensor) -> Tensor:
        answers.append(may_call_kernel(x))
        return x.sum()

    transform(function)(torch.ones(2, 2))
    assert answers
    return any(answers)


def test_nobody_listens_to_plain_tensors() -> None:
    x, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    assert may_call_kernel(x, None, x)
    assert not may_call_kernel(x, parameter)
    with torch.no_grad():
        assert may_call_kernel(x, parameter)
    with torch.inference_mode():
        assert may_call_kernel(x, parameter)
    with torch.autocast("cpu"):
        assert may_call_kernel(x)
    assert may_call_kernel(x)


def test_a_profiler_listens() -> None:
    x = torch.randn(2, 4, 3, 3)
    with torch.profiler.profile() as profile, ops.backend("reference"):
        assert not may_call_kernel(x)
        ops.group_norm_silu(x, 2)
    assert may_call_kernel(x)
    assert "aten::native_group_norm" in {event.name for event in profile.events()}


@pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))
def test_a_profiler_sees_cpp_kernels_that_are_called_directly() -> None:
    x, hidden = torch.randn(2, 4, 3, 3), torch.randn(3, 8)
    row = ops.ddim_coefficients(torch.tensor(0.3), torch.tensor(0.6))
    with torch.profiler.profile() as profile, ops.backend("cpp"):
        assert _direct.may_call_kernel(x, backend="cpp")
        ops.group_norm_silu(x.requires_grad_(), 2).sum().backward()
        ops.group_norm_silu(x.detach(), 2)
        ops.geglu(hidden)
        ops.ddim_step(hidden, hidden, row)
    names = {event.name for event in profile.events()}
    for kernel in ("group_norm_silu", "group_norm_silu_bwd", "geglu_fwd", "diffusion_step_fwd"):
        assert f"fastldm::{kernel}" in names


def test_modes_and_subclasses_listen() -> None:
    x = torch.ones(2)
    assert not may_call_kernel(x.to("meta"))
    assert not may_call_kernel(x, x.as_subclass(_Subclass))
    assert not may_call_kernel(torch._neg_view(x))
    with FakeTensorMode():
        assert not may_call_kernel(torch.ones(2))
    with FlopCounterMode(display=False):
        assert not may_call_kernel(x)
    with forward_ad.dual_level():
        assert not may_call_kernel(x)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_transforms_listen(transform: Callable[..., Callable[[Tensor], object]]) -> None:
    assert not _seen_by(transform)


def test_a_compiler_listens() -> None:
    def function(x: Tensor) -> Tensor:
        return x + may_call_kernel(x)

    x = torch.zeros(2)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x)
    assert torch.equal(function(x), x + 1)


def test_a_mode_counts_a_kernel_as_an_operator() -> None:
    """Called past the dispatcher, it would be missing from what the mode sees."""

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func._opname)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    x = torch.randn(2, 4, 3, 3)
    expected = ops.group_norm_silu(x, 2)
    with ops.backend("reference"):
        reference = ops.group_norm_silu(x, 2)
    torch.testing.assert_close(expected, reference)
    with Names():
        found = ops.group_norm_silu(x, 2)
    assert "group_norm_silu_fwd" in seen or "native_group_norm" in seen
    assert torch.equal(found, expected)


def test_forward_mode_gradients_are_not_lost() -> None:
    """The formula has them, and a kernel says that it has none."""
    x, tangent = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        with ops.backend("reference"):
            assert forward_ad.unpack_dual(ops.group_norm_silu(dual, 2)).tangent is not None
        if ops.explain("group_norm_silu", x, 2).startswith("group_norm_silu: served by cpp"):
            with pytest.raises(RuntimeError, match="jvp"):
                ops.group_norm_silu(dual, 2)
