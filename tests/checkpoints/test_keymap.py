"""The table of names in both directions."""

from __future__ import annotations

import pytest
import torch

from fastldm.checkpoints.keymap import Place, make_rows, to_compvis, to_fastldm
from fastldm.errors import CheckpointError, ConfigError

PLACES = {
    "conv": Place("first.0"),
    "to_q": Place("qkv", trailing=1, heads=2),
    "to_k": Place("qkv", trailing=1, heads=2),
    "to_v": Place("qkv", trailing=1, heads=2),
    "table.weight": Place("table"),
}


def ours() -> dict[str, torch.Tensor]:
    # In another order than the table's, which decides.
    parts = {f"to_{part}.weight": torch.randn(4, 4) for part in "vkq"}
    biases = {f"to_{part}.bias": torch.randn(4) for part in "vkq"}
    return {
        "conv.weight": torch.randn(2, 3, 1, 1),
        "table.weight": torch.randn(5),
        **parts,
    } | biases


def test_packed_projections_are_heads_then_queries_keys_and_values() -> None:
    state = ours()
    theirs = to_compvis(make_rows(PLACES, state), state)
    assert {name: tuple(value.shape) for name, value in theirs.items()} == {
        "first.0.weight": (2, 3, 1, 1),
        "qkv.weight": (12, 4, 1),
        "qkv.bias": (12,),
        "table": (5,),
    }
    by_head = theirs["qkv.bias"].reshape(2, 3, 2)
    for index, part in enumerate("qkv"):
        assert torch.equal(by_head[:, index].flatten(), state[f"to_{part}.bias"])
    back = to_fastldm(make_rows(PLACES, state), theirs, state, "file")
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_results_are_memory_of_their_own_in_the_dtype_asked_for() -> None:
    state = ours()
    rows = make_rows(PLACES, state)
    theirs = {name: value.double() for name, value in to_compvis(rows, state).items()}
    back = to_fastldm(rows, theirs, state, "file")
    assert {value.dtype for value in back.values()} == {torch.float32}
    double = to_fastldm(rows, theirs, state, "file", torch.float64)
    assert {value.dtype for value in double.values()} == {torch.float64}
    pointers = {value.untyped_storage().data_ptr() for value in double.values()}
    assert not pointers & {value.untyped_storage().data_ptr() for value in theirs.values()}
    assert all(value.is_contiguous() for value in double.values())


def test_names_shapes_and_types_must_fit() -> None:
    state = ours()
    rows = make_rows(PLACES, state)
    theirs = to_compvis(rows, state)
    with pytest.raises(CheckpointError, match=r"file: .*missing table.*unexpected more"):
        changed = {name: value for name, value in theirs.items() if name != "table"}
        to_fastldm(rows, {**changed, "more": torch.zeros(1)}, state, "file")
    with pytest.raises(CheckpointError, match=r"qkv.weight is \[12, 4\] in the file, \[12, 4, 1\]"):
        to_fastldm(rows, {**theirs, "qkv.weight": theirs["qkv.weight"][..., 0]}, state, "file")
    with pytest.raises(CheckpointError, match=r"file: table is torch\.int64, not floating"):
        to_fastldm(rows, {**theirs, "table": theirs["table"].long()}, state, "file")


def test_a_weight_without_a_place_is_refused_or_left_out() -> None:
    state = {**ours(), "extra.weight": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"extra\.weight: CompVis's layout has no such weight"):
        make_rows(PLACES, state)
    assert len(make_rows(PLACES, state, leave_out=("extra.weight",))) == 4
