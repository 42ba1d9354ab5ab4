"""The bytes that the page on kernels gives are those that the interpreter counts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.specialisations import cross_attention as specialisations
from benchmarks.specialisations.cross_attention import Size
from fastldm.ops.cross_attention import plan


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("beside_keys", [0, 2**20], ids=["kept", "not kept"])
@pytest.mark.parametrize(
    "size",
    [Size(2, 40, 2, 21, 24, is_masked=True), Size(1, 40, 1, 5, 160, torch.bfloat16)],
    ids=str,
)
def test_bytes(
    size: Size,
    beside_keys: int,
    direction: str,
    traffic: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_BESIDE_KEYS", "_BESIDE_KEYS_AND_FEW_QUERIES"):
        monkeypatch.setattr(plan, name, beside_keys)
    # Few enough rows for several blocks, and for several blocks a program.
    monkeypatch.setattr(plan, "_MOST_ROWS", 16)
    monkeypatch.setattr(plan, "_FORWARD_WARPS", 32)
    monkeypatch.setattr(plan, "_BACKWARD_WARPS", 32)
    given = specialisations.operands(size, "cpu")
    for name, value in given.items():
        if value is not None and name != "key_mask":
            value.normal_()
    specialisations.launch(given, direction)
    assert sum(traffic) == specialisations.traffic(size, direction)[1]
