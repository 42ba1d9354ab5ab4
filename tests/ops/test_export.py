"""Every operator goes through torch.export, for any batch size, as the backend's raw operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops import _dispatch, _extension

ROW = ops.ddim_coefficients(torch.tensor(0.4), torch.tensor(0.7), 0.5)
DDPM_ROW = ops.ddpm_coefficients(torch.tensor(0.4), torch.tensor(0.7))
CODEBOOK = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def _codes(x: Tensor) -> Tensor:
    return x[:, 0].long().clamp(0, 6)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "group_norm_silu": lambda x: ops.group_norm_silu(x, 2, scale=x.mean((2, 3))),
    "cross_attention": lambda x: ops.cross_attention(
        *(x.movedim(1, -1).reshape(x.shape[0], 3, 5, 4),) * 3
    ),
    "geglu": lambda x: ops.geglu(x.movedim(1, -1)),
    "vector_quantize": lambda x: tuple(ops.vector_quantize(x, CODEBOOK)),
    "codebook_statistics": lambda x: tuple(ops.codebook_statistics(x, _codes(x), 7)),
    "ddim_step": lambda x: tuple(
        ops.ddim_step(x, x + 1, ROW, model_output_uncond=x, guidance_scale=3.0, seed=5, offset=2)
    ),
    "ddpm_step": lambda x: (
        ops.ddpm_step(x, x + 1, DDPM_ROW, clip_range=1.0, seed=5, return_original=False).prev_sample
    ),
}


class _Call(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Any:
        return CALLS[self.name](x)


def test_every_operator_is_here() -> None:
    assert CALLS.keys() == set(ops.OPERATORS)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in CALLS for backend in ("reference", "cpp")
     if (name, backend) in _dispatch._PREDICATES or backend == "reference"],
)  # fmt: skip
def test_an_exported_call_takes_any_batch_size(name: str, backend: str) -> None:
    problem = _extension.problem() if backend == "cpp" else None
    if problem is not None:
        pytest.skip(problem)
    with ops.backend(backend), torch.no_grad():
        dynamic = {"x": {0: torch.export.Dim("batch")}}
        exported = torch.export.export(
            _Call(name), (torch.randn(2, 4, 3, 5),), dynamic_shapes=dynamic
        ).module()
        for batch in (2, 5):
            x = torch.randn(batch, 4, 3, 5)
            torch.testing.assert_close(exported(x), CALLS[name](x))


@pytest.mark.parametrize("name", ["ddim_step", "vector_quantize"])
def test_the_graph_holds_the_raw_operator(name: str) -> None:
    with ops.backend("reference"), torch.no_grad():
        program = torch.export.export(_Call(name), (torch.randn(2, 4, 3, 5),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert f"fastldm.{name}_fwd.default" in targets
