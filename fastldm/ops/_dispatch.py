"""Which backend serves a call: predicates over device, dtype and shape, and nothing else.

A predicate takes the functional's own arguments and gives the reason why its backend cannot serve
them, or None. Everything here can be traced by torch.compile: the choice is made while tracing,
and the compiled code is guarded by what it depended on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastldm.errors import BackendUnavailableError, ConfigError
from fastldm.ops import _extension, _triton
from fastldm.ops.cross_attention import plan, winners

OPERATORS = (
    "group_norm_silu", "cross_attention", "vector_quantize", "codebook_statistics", "ddim_step",
    "ddpm_step", "geglu",
)  # fmt: skip
BACKENDS = ("triton", "cpp", "reference")
"""In the order in which "auto" tries them."""

# The interpreter, in which Triton kernels take CPU tensors, has to be asked for by name.
_BACKENDS_ON = {"cpu": ("cpp", "reference")}

_CUDA_DIMENSIONS = 8
_MOST_KEYS = 256
_SDPA = "scaled_dot_product_attention"
_WIDEST_HEAD = 160
# On a CPU. With more keys and wider heads, as in an autoencoder's attention, training was slower
# than with scaled_dot_product_attention when measured; all other calls were faster.
_WIDEST_HEAD_OF_MANY_KEYS = 256
_P = ParamSpec("_P")
_R = TypeVar("_R")
_REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STEP_DTYPES = (*_REAL_DTYPES, torch.int64)
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_logger = logging.getLogger("fastldm.ops")
_reported: set[tuple[str, str, str]] = set()
_requested: ContextVar[str] = ContextVar("fastldm_backend", default="auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every operator called inside the ``with`` block.

    The choice holds for this thread or asyncio task. Enter the block outside a function that is
    compiled by torch.compile; the function is compiled again for each choice.

    Args:
        name: ``"auto"`` (the fastest that can serve each call), ``"triton"``, ``"cpp"`` or
            ``"reference"``. One asked for by name serves every call or raises
            `BackendUnavailableError`; on the meta device, where nothing is computed, it serves
            every call.

    Raises:
        ConfigError: there is no backend of this name.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"backend: got {name!r}; accepted: 'auto', {_listed(BACKENDS)}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def explain(op_name: str, *args: Any, **kwargs: Any) -> str:
    """Say which backend would serve a call here and now, and why the others would not.

    Args:
        op_name: name of an operator, such as ``"group_norm_silu"``.
        args, kwargs: the arguments of the call; their values are not read.

    Returns:
        A line for each backend.

    Raises:
        ConfigError: there is no such operator.
    """
    if op_name not in OPERATORS:
        raise ConfigError(f"op_name: got {op_name!r}; accepted: {_listed(OPERATORS)}")
    requested = _requested.get()
    reasons = {name: why_not(op_name, name, *args, **kwargs) for name in BACKENDS}
    able = [name for name in BACKENDS if reasons[name] is None and requested in ("auto", name)]
    served = f"served by {able[0]}" if able else "not served, it would raise"
    lines = [f"{op_name}: {served} (asked for: {requested})"]
    for name, reason in reasons.items():
        lines.append(f"  {name}: {'can serve' if reason is None else reason}")
    return "\n".join(lines)


def choose(op_name: str, x: Tensor, *args: Any, **kwargs: Any) -> str:
    """The backend that serves this call; `x` is its first argument.

    Raises:
        BackendUnavailableError: the backend asked for by name cannot; the message says why.
    """
    requested = _requested.get()
    if requested == "auto":
        for name in _BACKENDS_ON.get(x.device.type, BACKENDS):
            reason = why_not(op_name, name, x, *args, **kwargs)
            if reason is None:
                return name
            _report_once(op_name, name, reason)
    elif x.is_meta:
        return requested  # its fake kernel, which serves what is counted and not computed
    reason = why_not(op_name, requested, x, *args, **kwargs)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {requested!r} cannot serve {op_name}: {reason}; "
            "use backend('auto') to let another one serve it"
        )
    return requested


def prefers_cpp(x: Tensor) -> bool:
    """Whether calls on `x` go to the C++ kernels, as far as its device says."""
    return x.is_cpu and _requested.get() in ("auto", "cpp") and _extension_problem() is None


def why_not(op_name: str, name: str, *args: Any, **kwargs: Any) -> str | None:
    """Why the backend `name` cannot serve a call; None where it can."""
    if name == "reference":
        return None
    predicate = _PREDICATES.get((op_name, name))
    if predicate is None:
        return f"there is no {name} kernel for {op_name}"
    return predicate(*args, **kwargs)


def _group_norm_silu_triton(x: Tensor, *_: Any, **__: Any) -> str | None:
    return _why_not_triton("x", x)


def _why_not_triton(name: str, x: Tensor) -> str | None:
    """What every Triton kernel asks of its first argument."""
    if x.dtype not in _TRITON_DTYPES:
        return f"no kernel for {name} of {x.dtype}"
    if x.device.type == "cuda":
        return _triton_problem()
    if x.device.type == "cpu" and _requested.get() == "triton" and _interprets():
        return None
    return f"it serves CUDA tensors, {name} is on {x.device}"


def _cross_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None
) -> str | None:
    keys, channels = k.shape[1], q.shape[3]
    if keys > _MOST_KEYS:
        return f"it takes at most {_MOST_KEYS} keys, k has {keys}; {_SDPA} takes more"
    if channels > _WIDEST_HEAD:
        return f"it takes at most {_WIDEST_HEAD} channels, q has {channels}; {_SDPA} takes more"
    reason = _why_not_triton("q", q)
    if reason is not None or _requested.get() != "auto":
        return reason
    if not plan.stays_on_chip(keys, channels, q.dtype):
        return f"{keys} keys of {channels} channels and {q.dtype} do not stay on chip"
    if winners.is_one_of(_sdpa_classes(q.device), q, k):
        return "torch's scaled_dot_product_attention was faster at this size when measured"
    return None


def _cross_attention_cpp(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None
) -> str | None:
    if q.device.type != "cpu":
        return f"it serves CPU tensors, q is on {q.device}"
    if q.dtype not in _REAL_DTYPES[:-1]:
        return f"no kernel for q of {q.dtype}"
    is_slow = k.shape[1] > _MOST_KEYS and q.shape[3] > _WIDEST_HEAD_OF_MANY_KEYS
    if is_slow and q.dtype == torch.float32 and _requested.get() == "auto":
        return "torch's scaled_dot_product_attention was faster at this size when measured"
    return _extension_problem()


def _step_triton(sample: Tensor, *operands: Tensor, **options: Any) -> str | None:
    return _why_not_triton("sample", sample) or _step_dtype_problem(*operands, *options.values())


def _geglu_triton(hidden_states: Tensor) -> str | None:
    return _why_not_triton("hidden_states", hidden_states)


def _geglu_cpp(hidden_states: Tensor) -> str | None:
    if hidden_states.device.type != "cpu":
        return f"it serves CPU tensors, hidden_states is on {hidden_states.device}"
    if hidden_states.dtype not in _REAL_DTYPES[:-1]:
        return f"no kernel for hidden_states of {hidden_states.dtype}"
    return _extension_problem()


def _group_norm_silu_cpp(x: Tensor, *_: Any, **__: Any) -> str | None:
    if x.device.type != "cpu":
        return f"it serves CPU tensors, x is on {x.device}"
    if x.dtype not in _REAL_DTYPES:
        return f"no kernel for x of {x.dtype}"
    return _extension_problem()


def _diffusion_step_cpp(sample: Tensor, *operands: Tensor, **options: Any) -> str | None:
    if sample.device.type != "cpu":
        return f"it serves CPU tensors, sample is on {sample.device}"
    return _step_dtype_problem(sample, *operands, *options.values()) or _extension_problem()


def _step_dtype_problem(*arguments: Any) -> str | None:
    for value in arguments:
        if isinstance(value, Tensor) and value.dtype not in _STEP_DTYPES:
            return f"no kernel for an operand of {value.dtype}"
    return None


def _vector_quantize_cpp(z: Tensor, codebook: Tensor, *, channel_dim: int = 1) -> str | None:
    if z.device.type not in ("cpu", "cuda"):
        return f"it serves CPU and CUDA tensors, z is on {z.device}"
    dtypes = _REAL_DTYPES if z.device.type == "cpu" else _REAL_DTYPES[:-1]
    if z.dtype not in dtypes or codebook.dtype not in dtypes:
        return f"no kernel for z of {z.dtype} and a codebook of {codebook.dtype} on {z.device.type}"
    if z.device.type == "cuda" and z.ndim > _CUDA_DIMENSIONS:
        return f"its CUDA kernels take {_CUDA_DIMENSIONS} dimensions, z has {z.ndim}"
    return _extension_problem() or _cuda_kernels_problem(z.device)


def _codebook_statistics_cpp(z: Tensor, *_: Any, **__: Any) -> str | None:
    return _vector_quantize_cpp(z, z)


def _constant_when_traced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have torch.compile call `function` while it traces, and keep the result.

    torch.compiler.assume_constant_result does no more than this, but importing what it imports
    loads Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_traced
def _extension_problem() -> str | None:
    return _extension.problem()


@_constant_when_traced
def _cuda_kernels_problem(device: torch.device) -> str | None:
    return _extension.cuda_problem(device)


@_constant_when_traced
def _sdpa_classes(device: torch.device) -> tuple[winners.Class, ...]:
    return winners.sdpa_classes(device)


@_constant_when_traced
def _triton_problem() -> str | None:
    return _triton.problem()


@_constant_when_traced
def _interprets() -> bool:
    return _triton.interprets()


# Not functools.cache: torch.compile would look through it and trace the function itself.
@_constant_when_traced
def _report_once(op_name: str, name: str, reason: str) -> None:
    if (op_name, name, reason) in _reported:
        return
    _reported.add((op_name, name, reason))
    # That there is no kernel, or none for this device, is no news; that the extension fails is.
    fails = name == "cpp" and (op_name, name) in _PREDICATES and reason == _extension.problem()
    level = logging.WARNING if fails else logging.INFO
    _logger.log(level, "%s is not served by the %s backend: %s", op_name, name, reason)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


_PREDICATES: dict[tuple[str, str], Callable[..., str | None]] = {
    ("group_norm_silu", "triton"): _group_norm_silu_triton,
    ("cross_attention", "triton"): _cross_attention_triton,
    ("cross_attention", "cpp"): _cross_attention_cpp,
    ("geglu", "triton"): _geglu_triton,
    ("geglu", "cpp"): _geglu_cpp,
    ("ddim_step", "triton"): _step_triton,
    ("ddpm_step", "triton"): _step_triton,
    ("group_norm_silu", "cpp"): _group_norm_silu_cpp,
    ("ddim_step", "cpp"): _diffusion_step_cpp,
    ("ddpm_step", "cpp"): _diffusion_step_cpp,
    ("vector_quantize", "cpp"): _vector_quantize_cpp,
    ("codebook_statistics", "cpp"): _codebook_statistics_cpp,
}
