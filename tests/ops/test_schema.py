"""Every raw operator holds to torch.library's contract, on each backend that serves here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.ops import _extension

Case = tuple[str, str, tuple[Any, ...]]


def _tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _norm_cases() -> list[Case]:
    cases: list[Case] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape in [(2, 8, 3, 5), (0, 8, 3, 5)]:
            x, residual, grad = (t.contiguous(memory_format=layout) for t in _tensors(*[shape] * 3))
            weight, bias, add, scale, shift = _tensors((8,), (8,), *[shape[:2]] * 3)
            mean, rstd = torch.zeros(shape[0], 4), torch.ones(shape[0], 4)
            for rest in [(weight, bias, add, residual, scale, shift), (None,) * 6]:
                w, b, a, r, s, t = rest
                cases.append(("group_norm_silu", "fwd", (x, 4, w, b, 1e-5, True, a, r, s, t)))
                wanted = [True, *(value is not None for value in (w, b, a, s, t))]
                arguments = (grad, x, mean, rstd, 4, w, b, 1e-5, True, a, r, s, t, wanted)
                cases.append(("group_norm_silu", "bwd", arguments))
    return cases


def _attention_cases() -> list[Case]:
    q, k, v, grad = _tensors((2, 3, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8), (2, 3, 2, 8))
    mask = torch.tensor([[True] * 5, [False] * 5])
    cases: list[Case] = []
    for key_mask in (None, mask):
        cases.append(("cross_attention", "fwd", (q, k, v, 0.3, key_mask)))
        for wanted in ([True] * 3, [True, False, False], [False, True, True]):
            arguments = (grad, q, k, v, 0.3, key_mask, wanted)
            cases.append(("cross_attention", "bwd", arguments))
    return cases


def _lookup_cases() -> list[Case]:
    codebook, (loss_a, loss_b) = _tensors((7, 4))[0], (torch.tensor(0.5), torch.tensor(1.5))
    cases: list[Case] = []
    for z in (
        *_tensors((2, 4, 3, 5), (0, 4, 3, 5)),
        _tensors((2, 4, 3, 5))[0].contiguous(memory_format=torch.channels_last),
        _tensors((2, 8, 3, 10))[0][:, ::2, :, ::2],
        _tensors((2, 4, 6))[0].bfloat16(),
    ):
        indices = torch.zeros(z.movedim(1, -1).shape[:-1], dtype=torch.int64)
        grad = torch.ones_like(z)
        # The loss of nothing is NaN, which opcheck takes for a difference.
        if z.numel():
            cases.append(("vector_quantize", "fwd", (z, codebook, 1)))
        arguments = (grad, loss_a, loss_b, z, codebook, indices, 1)
        cases.append(("vector_quantize", "bwd", arguments))
        cases.append(("vector_quantize", "statistics", (z, indices, 7, 1)))
    return cases


def _gated_cases() -> list[Case]:
    cases: list[Case] = []
    for shape in [(2, 3, 10), (0, 10), (6,)]:
        (hidden,) = _tensors(shape)
        (grad,) = _tensors((*shape[:-1], shape[-1] // 2))
        cases.append(("geglu", "fwd", (hidden,)))
        cases.append(("geglu", "bwd", (grad, hidden)))
    sliced = _tensors((3, 2, 12))[0].transpose(0, 1)[..., 1:11]
    cases.append(("geglu", "fwd", (sliced,)))
    cases.append(("geglu", "bwd", (torch.ones(5).expand(2, 3, 5), sliced)))
    return cases


CASES = [*_norm_cases(), *_attention_cases(), *_lookup_cases(), *_gated_cases()]
# Which operator has a kernel where; the reference has all.
CPP_OPERATORS = ("group_norm_silu", "vector_quantize", "geglu")
TRITON_OPERATORS = ("group_norm_silu", "cross_attention", "geglu")


@pytest.mark.parametrize(
    ("index", "name"),
    [(index, "reference") for index in range(len(CASES))]
    + [(index, "cpp") for index, case in enumerate(CASES) if case[0] in CPP_OPERATORS]
    + [(index, "triton") for index, case in enumerate(CASES) if case[0] in TRITON_OPERATORS],
)
def test_opcheck(index: int, name: str, triton_device: str) -> None:
    op_name, direction, arguments = CASES[index]
    problem = _extension.problem() if name == "cpp" else None
    if problem is not None:
        pytest.skip(problem)
    raw = getattr(torch.ops.fastldm, f"{op_name}_{direction}").default
    torch.library.opcheck(raw, arguments, {"backend": name})


@pytest.mark.parametrize(
    "arguments", [arguments for _, direction, arguments in _norm_cases() if direction == "bwd"]
)
def test_unwanted_gradients_are_empty(arguments: tuple[Any, ...]) -> None:
    *rest, wanted = arguments
    for position in range(len(wanted)):
        only = [i == position and want for i, want in enumerate(wanted)]
        found = torch.ops.fastldm.group_norm_silu_bwd(*rest, only, backend="reference")
        assert [value.shape != (0,) for value in found] == only


def test_every_defined_operator_is_checked_here_or_beside_its_functional() -> None:
    defined = {f"{op}_{way}" for op, way, _ in CASES} | {"ddim_step_fwd", "ddpm_step_fwd"}
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastldm::")]
    assert {name.removeprefix("fastldm::") for name in names} == defined
