"""The bytes that the page on kernels gives are those that the interpreter counts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.specialisations import group_norm_silu as specialisations
from fastldm.ops.group_norm_silu import plan


@pytest.mark.parametrize("names", [(), specialisations.AFFINE, specialisations.EVERY_OPTION])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("elements", [4096, 64])
def test_bytes(
    names: tuple[str, ...],
    channels_last: bool,
    elements: int,
    traffic: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {
        "elements": elements, "block_c": 16, "elements_per_thread": 16, "work": 128, "programs": 1,
        "num_warps": 1,
    }  # fmt: skip
    kernels = ("fwd", "bwd", "moments", "apply", "bwd_sums", "bwd_apply")
    monkeypatch.setattr(plan, "_configs", lambda device: dict.fromkeys(kernels, config))
    for cached in (plan.whole, plan.split):
        monkeypatch.setattr(plan, cached.__name__, cached.__wrapped__)
    given = specialisations.operands((2, 24, 5, 7), torch.float16, channels_last, names, "cpu")
    for value in given.values():
        value.normal_()
    specialisations.forward(given, 4)
    assert sum(traffic) == specialisations.forward_bytes(given, 4)[1]
    traffic.clear()
    specialisations.backward(given, 4)
    assert sum(traffic) == specialisations.backward_bytes(given, 4)[1]
