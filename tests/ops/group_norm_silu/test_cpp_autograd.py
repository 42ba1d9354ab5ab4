"""The backward pass that C++ records for eager tensors on a CPU does all that torch's own can."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastldm import ops
from fastldm.ops import _extension

pytestmark = pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))

Gradients = tuple[Tensor | None, ...]


class _Subclass(torch.Tensor):
    pass


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def _operands(requires_grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 6, 3, 5), 6, 6)]
    return [value.requires_grad_(requires_grad) for value in tensors]


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 3, weight, bias))


def _fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.group_norm_silu(x, 3, weight, bias)


def _upstream(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


def _gradients(norm: Callable[..., Tensor], operands: list[Tensor]) -> Gradients:
    y = norm(*operands)
    wanted = [value for value in operands if value.requires_grad]
    return torch.autograd.grad(y, wanted, _upstream(y))


def _is_recorded_in_cpp(y: Tensor) -> bool:
    assert y.grad_fn is not None
    return "GroupNormSilu" in y.grad_fn.name()


def _assert_same(found: Gradients, expected: Gradients) -> None:
    for gradient, like in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, like, rtol=1e-9, atol=1e-11)


def test_only_what_requires_a_gradient_has_one() -> None:
    for needed in ([0], [1], [0, 2], [1, 2], [0, 1, 2]):
        operands = _operands(requires_grad=False)
        for i in needed:
            operands[i].requires_grad_()
        assert _is_recorded_in_cpp(_fused(*operands))
        _assert_same(_gradients(_fused, operands), _gradients(_plain, operands))


def test_nothing_is_recorded_where_nothing_is_to_be() -> None:
    assert _fused(*_operands(requires_grad=False)).grad_fn is None
    with torch.no_grad():
        assert _fused(*_operands()).grad_fn is None
    with torch.inference_mode():
        assert _fused(*_operands()).is_inference()


def test_a_tensor_given_twice_has_both_gradients() -> None:
    x, _, _ = _operands()

    def fused(x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 3, residual=x)

    def plain(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x + x, 3))

    assert _is_recorded_in_cpp(fused(x))
    _assert_same(_gradients(fused, [x]), _gradients(plain, [x]))


def test_without_activation() -> None:
    x, _, _ = _operands()

    def fused(x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 3, activation=None, eps=0.1)

    def plain(x: Tensor) -> Tensor:
        return F.group_norm(x, 3, eps=0.1)

    assert _is_recorded_in_cpp(fused(x))
    _assert_same(_gradients(fused, [x]), _gradients(plain, [x]))


def test_second_derivatives() -> None:
    def curvature(norm: Callable[..., Tensor]) -> Gradients:
        operands = _operands()
        slopes = torch.autograd.grad(norm(*operands).square().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(slope.sin().sum() for slope in slopes), operands)

    _assert_same(curvature(_fused), curvature(_plain))


def test_gradients_of_a_batch_of_gradients() -> None:
    operands = _operands()
    upstream = torch.randn(4, 2, 6, 3, 5, dtype=torch.float64)

    def batched(norm: Callable[..., Tensor]) -> Gradients:
        return torch.autograd.grad(norm(*operands), operands, upstream, is_grads_batched=True)

    _assert_same(batched(_fused), batched(_plain))


def test_a_mode_sees_the_backward_pass() -> None:
    operands = _operands()
    y = _fused(*operands)
    assert _is_recorded_in_cpp(y)
    with _Names() as names:
        y.sum().backward()
    assert "group_norm_silu_bwd" in names.seen
    _assert_same(
        tuple(value.grad for value in operands),
        torch.autograd.grad(_plain(*operands).sum(), operands),
    )


def test_hooks_see_what_is_saved() -> None:
    packed: list[Tensor] = []

    def pack(value: Tensor) -> int:
        packed.append(value)
        return len(packed) - 1

    operands = _operands()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i].clone()):
        y = _fused(*operands)
    assert len(packed) == 5  # x, weight, bias, mean and 1/deviation
    y.sum().backward()
    _assert_same(
        tuple(value.grad for value in operands),
        torch.autograd.grad(_plain(*operands).sum(), operands),
    )


def test_checkpointing_computes_it_again() -> None:
    operands = _operands()

    def again(*operands: Tensor) -> Tensor:
        result: Tensor = checkpoint(_fused, *operands, use_reentrant=False)
        return result

    _assert_same(_gradients(again, operands), _gradients(_plain, operands))


def test_a_changed_input_is_noticed() -> None:
    x, weight, bias = _operands(requires_grad=False)
    y = _fused(x, weight.requires_grad_(), bias)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_graph_is_freed_after_use() -> None:
    y = _fused(*_operands()).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_subclasses_and_lazy_tensors_take_the_other_way() -> None:
    x, weight, bias = _operands()
    expected = _plain(x, weight, bias)
    for other in (x.as_subclass(_Subclass), torch._neg_view(-x)):
        y = _fused(other, weight, bias)
        assert not _is_recorded_in_cpp(y)
        torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)


def test_threads_may_run_the_backward_pass() -> None:
    """Without the interpreter's lock: a thread of torch's own runs it beside another device's."""
    operands = _operands()
    expected = _gradients(_plain, operands)
    found: list[Gradients] = []
    y = _fused(*operands)

    def run() -> None:
        found.append(torch.autograd.grad(y, operands, _upstream(y), retain_graph=True))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for gradients in found:
        _assert_same(gradients, expected)
