"""Whether a kernel may be called past torch's dispatcher, which costs more than a small one takes.

The dispatcher is there for those who listen: autograd, tracers, profilers, fake tensors, function
transforms, modes and subclasses. Where none of them does, a call of the kernel itself has the same
result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from fastldm.ops import _schema

_ALWAYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
# What a thread includes in every dispatch where nothing listens, in inference mode and outside.
_QUIET = frozenset(
    {_ALWAYS.raw_repr(), _ALWAYS.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr()}
)
_PLAIN = (Tensor, torch.nn.Parameter)


def may_call_kernel(*operands: Tensor | None, backend: str) -> bool:
    """Whether nothing listens to operations on these tensors; never while a graph is traced.

    Profilers listen, but the C++ kernels show themselves to them, under their own names.
    """
    if torch.compiler.is_compiling() or (profiler._is_profiler_enabled and backend != "cpp"):
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _QUIET:
        return False
    if forward_ad._current_level >= 0:
        return False
    records = torch.is_grad_enabled()
    for value in operands:
        if value is None:
            continue
        if type(value) not in _PLAIN or value.is_meta or (records and value.requires_grad):
            return False
        if value.is_neg():  # its memory holds what is to be negated when it is read
            return False
    return True


def raw(name: str, backend: str, *operands: Tensor | None) -> Callable[..., Any]:
    """What computes the raw operator `name` on these operands: the kernel itself where it may."""
    if may_call_kernel(*operands, backend=backend):
        return _schema.kernel(name, backend)
    return partial(getattr(torch.ops.fastldm, name), backend=backend)
