"""Weights from CompVis's names to ours and back, by one table for both directions.

A table (`Places`) says for each of our modules, or single parameters, where its weights are in
CompVis's layout; what is inside a listed module keeps its names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.errors import CheckpointError, ConfigError
from fastldm.models.weights import check_state_dict


class Place(NamedTuple):
    """Where the weights of a module are.

    Several of our modules in one place are the parts of a packed projection: its rows are theirs,
    one after the other in the order of the table.
    """

    name: str
    trailing: int = 0
    """Dimensions of size 1 at the end of their weight: 1×1 convolutions where we have a linear
    layer."""
    heads: int = 1
    """Of a packed projection: heads that its rows are divided into before the parts."""


Places = Mapping[str, Place]


@dataclass(frozen=True)
class Row:
    """One tensor of theirs, and the tensors of ours that it holds.

    Attributes:
        theirs: its name.
        ours: their names.
        shape: of theirs.
        sizes: rows that each of ours has.
        heads: see `Place`.
    """

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    heads: int

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Ours from theirs, still with their trailing dimensions."""
        if len(self.ours) == 1:
            return (tensor,)
        if self.heads > 1:
            tensor = tensor.unflatten(0, (self.heads, len(self.ours), -1)).transpose(0, 1)
            tensor = tensor.flatten(0, 2)
        return tensor.split(self.sizes)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Theirs from ours."""
        packed = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.heads > 1:
            packed = packed.unflatten(0, (len(self.ours), self.heads, -1)).transpose(0, 1)
            packed = packed.flatten(0, 2)
        return packed.reshape(self.shape)


def make_rows(
    places: Places, state_dict: Mapping[str, Tensor], leave_out: Sequence[str] = ()
) -> list[Row]:
    """The table for single tensors.

    Args:
        places: see there.
        state_dict: our model's; only names and shapes are used.
        leave_out: names of ours that CompVis's layout does not have.

    Raises:
        ConfigError: CompVis's layout has no place for one of our tensors.
    """
    order = {module: position for position, module in enumerate(places)}
    parts: dict[str, list[tuple[int, str]]] = {}
    found: dict[str, Place] = {}
    for key in state_dict:
        if key in leave_out:
            continue
        module = key
        while module not in places:
            if not module:
                raise ConfigError(f"{key}: CompVis's layout has no such weight")
            module = module.rpartition(".")[0]
        name = places[module].name + key[len(module) :]
        parts.setdefault(name, []).append((order[module], key))
        found[name] = places[module]
    rows = []
    for name, numbered in parts.items():
        place = found[name]
        keys = [key for _, key in sorted(numbered)]
        sizes = tuple(len(state_dict[key]) for key in keys)
        shape = tuple(state_dict[keys[0]].shape)
        if len(keys) > 1:
            shape = (sum(sizes), *shape[1:])
        if len(shape) == 2:
            shape += (1,) * place.trailing
        rows.append(Row(name, tuple(keys), shape, sizes, place.heads if len(keys) > 1 else 1))
    return rows


def to_fastldm(
    rows: Sequence[Row],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Our state dict from tensors under CompVis's names; every tensor is new memory.

    Args:
        rows: of `make_rows`.
        tensors: exactly those of `rows`.
        expected: our model's state dict, whose shapes and dtypes the result has.
        source: for messages.
        dtype: of the result, in place of that.

    Raises:
        CheckpointError: a name is missing, or one too many, a shape is another, or a tensor is
            not floating, or not whole numbers where ours is.
    """
    wanted = {row.theirs: torch.empty(row.shape, device="meta") for row in rows}
    check_state_dict(tensors, wanted, source)
    result = {}
    for row in rows:
        tensor = tensors[row.theirs]
        floating = expected[row.ours[0]].is_floating_point()
        if tensor.is_floating_point() != floating:
            kind = "floating" if floating else "whole numbers"
            raise CheckpointError(f"{source}: {row.theirs} is {tensor.dtype}, not {kind}")
        for name, part in zip(row.ours, row.split(tensor), strict=True):
            like = expected[name]
            chosen = dtype if dtype is not None and floating else like.dtype
            copy = torch.empty(like.shape, dtype=chosen, device=tensor.device)
            result[name] = copy.copy_(part.reshape(like.shape))
    return result


def to_compvis(rows: Sequence[Row], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under CompVis's names from our state dict."""
    return {row.theirs: row.join([state_dict[name].detach() for name in row.ours]) for row in rows}
