"""Calls that scaled_dot_product_attention won when it was measured go to it, others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops import _dispatch, _triton
from fastldm.ops.cross_attention import winners

WON: winners.Class = {
    "dtypes": ["float16", "bfloat16"], "queries": [1, 64], "keys": [129, 256], "channels": [64, 64]
}  # fmt: skip


def _operands(
    lq: int = 64, lk: int = 256, width: int = 64, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (torch.empty(1, n, 2, width, dtype=dtype, device="meta") for n in (lq, lk))
    return q, k, k


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"lq": 1, "lk": 129}, True),
        ({"dtype": torch.float32}, False),
        ({"lq": 65}, False),
        ({"lk": 128}, False),
        ({"lk": 257}, False),
        ({"width": 63}, False),
        ({"width": 65}, False),
    ],
)
def test_classes(changes: dict[str, object], expected: bool) -> None:
    q, k, _ = _operands(**changes)  # type: ignore[arg-type]
    assert winners.is_one_of((WON,), q, k) == expected
    assert winners.is_one_of(({**WON, "keys": [1, 1]}, WON), q, k) == expected
    assert not winners.is_one_of((), q, k)


def test_auto_leaves_them_to_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_why_not_triton", lambda *_: None)
    monkeypatch.setattr(_dispatch, "_sdpa_classes", lambda _: (WON,))
    assert _dispatch.choose("cross_attention", *_operands()) == "reference"
    told = ops.explain("cross_attention", *_operands()).splitlines()
    assert told[0] == "cross_attention: served by reference (asked for: auto)"
    assert "scaled_dot_product_attention was faster" in told[1]
    assert _dispatch.choose("cross_attention", *_operands(lq=65)) == "triton"
    with ops.backend("triton"):
        assert _dispatch.choose("cross_attention", *_operands()) == "triton"


def test_self_attention_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_why_not_triton", lambda *_: None)
    for operands, reason in [
        (_operands(lk=257), "at most 256 keys, k has 257"),
        (_operands(width=161), "at most 160 channels, q has 161"),
    ]:
        told = ops.explain("cross_attention", *operands).splitlines()
        assert told[0] == "cross_attention: served by reference (asked for: auto)"
        assert reason in told[1]
        assert "scaled_dot_product_attention" in told[1]


def test_auto_leaves_heads_to_torch_that_do_not_stay_on_chip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_dispatch, "_why_not_triton", lambda *_: None)
    operands = _operands(lk=256, width=160)
    told = ops.explain("cross_attention", *operands).splitlines()
    assert told[0] == "cross_attention: served by reference (asked for: auto)"
    assert "256 keys of 160 channels and torch.float16 do not stay on chip" in told[1]
    assert _dispatch.choose("cross_attention", *_operands(lk=77, width=160)) == "triton"
    with ops.backend("triton"):
        assert _dispatch.choose("cross_attention", *operands) == "triton"


def test_the_table_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winners, "_table", lambda: {"default": [], "sm_90": [WON]})
    monkeypatch.setattr(winners, "device_key", lambda device: device.type)
    assert winners.sdpa_classes(torch.device("cpu")) == ()
    monkeypatch.setattr(winners, "device_key", lambda device: "sm_90")
    assert winners.sdpa_classes(torch.device("cpu")) == (WON,)


def test_what_is_stored_can_be_read() -> None:
    assert _triton.device_key(torch.device("cpu")) == "default"
    table = winners._table()
    assert "default" in table
    for classes in table.values():
        for won in classes:
            assert set(won) == {"dtypes", "queries", "keys", "channels"}
            assert set(won["dtypes"]) <= {"float16", "bfloat16", "float32"}
            for axis in ("queries", "keys", "channels"):
                least, largest = won[axis]
                assert 1 <= least <= largest
