"""What a call on meta tensors would compute, move and hold, by operator family."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastldm import ops
from fastldm.profiling import flops as flops  # registers the formulas of our operators
from fastldm.profiling.families import FAMILIES, family_of

_MAKES_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided")
_VIEWS = ("detach", "_unsafe_view", "lift_fresh", "_reshape_alias")


@dataclass
class Cost:
    """What a piece of work costs, by operator family.

    Attributes:
        flops: floating-point operations of convolutions, matrix products, attention and lookups.
        bytes: read and written by operators, each operand once an operator; caches that keep an
            operand from one to the next are not considered.
        peak_bytes: the most that is held at once beside the weights and inputs.
    """

    flops: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0

    @property
    def total_flops(self) -> int:
        """Of all families."""
        return self.flops.total()

    @property
    def total_bytes(self) -> int:
        """Of all families."""
        return self.bytes.total()

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.total_flops / max(self.total_bytes, 1)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            max(self.peak_bytes, other.peak_bytes),
        )

    def times(self, count: int) -> Cost:
        """That work, `count` times one after the other."""
        return Cost(
            Counter({family: count * value for family, value in self.flops.items()}),
            Counter({family: count * value for family, value in self.bytes.items()}),
            self.peak_bytes,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "flops": self.total_flops,
            "bytes": self.total_bytes,
            "intensity": self.intensity,
            "peak_bytes": self.peak_bytes,
            "flops_by_family": {family: self.flops[family] for family in FAMILIES},
            "bytes_by_family": {family: self.bytes[family] for family in FAMILIES},
        }


def count(call: Callable[[], object], *, fused: bool) -> Cost:
    """Run `call`, whose tensors are on the meta device, and count.

    Args:
        call: the work; what it returns is dropped.
        fused: fastldm's operators, whatever is compiled here; else plain torch. Attention is one
            operator in both, as torch has fused kernels of its own.

    Returns:
        The cost; no time passes on a device and nothing is allocated.
    """
    mode = _Counting()
    with ops.backend("cpp" if fused else "reference"), _WholeAttention(), mode:
        call()
    return mode.cost


class _WholeAttention(TorchFunctionMode):
    """Keeps scaled_dot_product_attention one operator, which it is on every device but meta."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (operand.transpose(1, 2) for operand in args)
        with ops.backend("cpp"):
            return ops.cross_attention(q, k, v, scale=kwargs.get("scale")).transpose(1, 2)


class _Counting(TorchDispatchMode):
    """Adds up the cost of each operator as it is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()
        self._held = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moves, family, formula = _known(func)
        if moves == "nothing":
            return result
        if formula is not None:
            self.cost.flops[family] += formula(*args, **kwargs, out_val=result)
        outputs = _tensors((result,))
        if moves == "no bytes":
            moved, made = 0, outputs
        else:
            inputs = _tensors((*args, *kwargs.values()))
            moved = sum(map(_nbytes, inputs)) + sum(map(_nbytes, outputs))
            given = {tensor.untyped_storage()._cdata for tensor in inputs}
            made = [t for t in outputs if t.untyped_storage()._cdata not in given]
        self.cost.bytes[family] += moved
        for output in made:
            self._hold(output)
        return result

    def _hold(self, tensor: Tensor) -> None:
        """Count a new storage as held until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._held += size
        self.cost.peak_bytes = max(self.cost.peak_bytes, self._held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._held -= size


@functools.cache
def _known(func: Any) -> tuple[str, str, Callable[..., int] | None]:
    """What an operator moves, its family, and its FLOP formula."""
    name = func.overloadpacket.__name__
    is_view = func.is_view or name in _VIEWS
    moves = "nothing" if is_view else "no bytes" if name in _MAKES_EMPTY else "operands"
    return moves, family_of(str(func)) or "other", flop_registry.get(func.overloadpacket)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among arguments, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _nbytes(tensor: Tensor) -> int:
    """Of a tensor's elements in memory, in which an expanded one is small."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
