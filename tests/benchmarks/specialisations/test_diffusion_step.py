"""The bytes that the page on kernels gives are those that the interpreter counts."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from benchmarks.specialisations import diffusion_step as specialisations

CALLS = {
    specialisations.describe(call): dataclasses.replace(call, shape=(2, 4, 9, 31))
    for call in specialisations.calls()
}


@pytest.mark.parametrize("name", CALLS)
def test_bytes(name: str, traffic: list[int]) -> None:
    call = CALLS[name]
    given = specialisations.operands(call, "cpu")
    for value in given.values():
        value.fill_(1)
    specialisations.launch(call, given)
    assert sum(traffic) == specialisations.moved_bytes(call, given)[1]


def test_bytes_of_moments_with_a_scale_a_sample(
    traffic: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specialisations.triton_kernel, "MOMENTS_BLOCK", 128)
    monkeypatch.setattr(specialisations.triton_kernel, "MOST_PIECES", 4)
    rescaled = next(c for c in specialisations.calls() if "guidance_rescale" in c.options)
    call = dataclasses.replace(rescaled, shape=(2, 4, 9, 31), by_sample=("guidance_scales",))
    given = specialisations.operands(call, "cpu")
    for value in given.values():
        value.uniform_()
    specialisations.launch(call, given)
    assert sum(traffic) == specialisations.moved_bytes(call, given)[1]
