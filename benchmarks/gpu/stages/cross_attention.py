"""Cross-attention, forward and backward, against eager, torch.compile and every fused SDPA."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.clock import clock_for
from benchmarks.gpu.contest import OURS, Case, Contest, check_against, measure_all
from benchmarks.gpu.peers import COMPILED, backend_of, compiled
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from fastldm import ops

SDPA = "SDPA"
"""With the backend that torch itself chooses."""

# Batch, queries, heads, channels of a head.
MODELS: dict[str, list[tuple[int, int, int, int]]] = {
    "SD1.5 512²": [(2, 4096, 8, 40), (2, 1024, 8, 80), (2, 256, 8, 160), (2, 64, 8, 160)],
    "SD2 768²": [(2, 9216, 5, 64), (2, 2304, 10, 64), (2, 576, 20, 64), (2, 144, 20, 64)],
    "SDXL 1024²": [(2, 4096, 10, 64), (2, 1024, 20, 64)],
}
DRY = {"dry run": [(1, 8, 1, 16)]}
KEYS = (77, 1, 256)
_SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Size = tuple[int, int, int, int, int]
"""Batch, queries, keys, heads, channels."""


def run(context: Context) -> Iterator[Row]:
    yield from measure_all(_cases(context), clock_for(context.device))


def _cases(context: Context) -> Iterator[Case]:
    models = DRY if context.is_dry else MODELS
    for keys in (5,) if context.is_dry else KEYS:
        for backward in (False, True):
            for model, sizes in models.items():
                for B, Lq, H, D in sizes:
                    size = (B, Lq, keys, H, D)
                    yield _case(context, model, size, torch.float16, backward)


def _case(context: Context, model: str, size: Size, dtype: torch.dtype, backward: bool) -> Case:
    B, Lq, Lk, H, D = size
    # Forward q, k, v and o; backward q, k, v, the gradient of o, and theirs.
    queries, keys = B * Lq * H * D, B * Lk * H * D
    count = (3 * queries + 4 * keys if backward else 2 * queries + 2 * keys) * dtype.itemsize
    products = 5 if backward else 2
    direction = "backward" if backward else "forward"
    return Case(
        f"{model}: B={B} Lq={Lq} Lk={Lk} H={H} D={D} {str(dtype).removeprefix('torch.')} "
        f"{direction}",
        count,
        lambda: contest(context.device, size, dtype, backward),
        flops=2.0 * products * B * H * Lq * Lk * D,
        rate=str(dtype).removeprefix("torch."),
        is_target=(Lk == 77 or context.is_dry) and not backward,
    )


def contest(
    device: str,
    size: Size,
    dtype: torch.dtype,
    backward: bool,
    peers: Collection[str] | None = None,
) -> Contest:
    """Ours, eager, compiled, and SDPA with each of its fused backends; or these peers alone."""
    B, Lq, Lk, H, D = size
    operands = tuple(
        torch.randn(B, n, H, D, device=device).to(dtype) for n in (Lq, Lk, Lk)
    )  # fmt: skip
    upstream = torch.randn(B, Lq, H, D, device=device)
    backend = backend_of("cross_attention", device)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with ops.backend(backend):
            return ops.cross_attention(q, k, v)

    attentions: dict[str, Attention] = {OURS: fused, SDPA: sdpa, "eager": _eager}
    left_out = {}
    if device == "cuda":
        attentions |= {name: _by(choice) for name, choice in _SDPA_BACKENDS.items()}
    else:
        left_out |= dict.fromkeys(_SDPA_BACKENDS, "in a dry run")
    if device != "cuda" or Lk != 77:
        left_out[COMPILED] = "compiled at 77 keys on a GPU alone"
    elif peers is None:
        attentions[COMPILED] = compiled(_eager)
    if peers is not None:
        chosen = {OURS, *peers}
        attentions = {name: call for name, call in attentions.items() if name in chosen}
        left_out = {}

    def results(attention: Attention, values: tuple[Tensor, ...]) -> Any:
        if not backward:
            return lambda: (attention(*values),)
        leaves = [value.detach().requires_grad_() for value in values]
        o = attention(*leaves)
        gradient = upstream.to(o.dtype)
        return lambda: torch.autograd.grad(o, leaves, gradient, retain_graph=True)

    exact = results(_eager, tuple(value.double() for value in operands))()
    contestants = {}
    for name, attention in attentions.items():
        try:
            contestants[name] = results(attention, operands)
        except Exception as error:
            # A size that a backend of SDPA refuses.
            if name == OURS:
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip()[:400]}"
    plain = results(_eager, operands)()
    return Contest(contestants, check_against(exact, plain), left_out)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, on the strides of [B, L, H, D]."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def _by(choice: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(choice):
            return sdpa(q, k, v)

    return attend


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
