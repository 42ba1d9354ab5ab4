"""The bytes that the page on kernels gives are those that the interpreter counts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.specialisations import geglu as specialisations


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 640), (3, 7, 74)])
def test_bytes(
    direction: str, dtype: torch.dtype, shape: tuple[int, ...], traffic: list[int]
) -> None:
    grad, hidden = specialisations.operands(shape, dtype, "cpu")
    specialisations.launch(direction, grad.fill_(1), hidden.fill_(1))
    assert sum(traffic) == specialisations.moved_bytes(direction, hidden)
