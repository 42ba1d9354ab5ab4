"""Indices into the used codes of a codebook, as taming-transformers' ``remap`` has them.

A large codebook that uses few of its codes is given a second numbering: position i stands for the
code ``used[i]``, so that a model of the indices needs as many classes only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastldm.errors import ConfigError

UnknownIndex = str | int


def checked_used(used: Tensor | Sequence[int], num_embeddings: int) -> Tensor:
    """The used codes as int64 [n].

    Raises:
        ConfigError: they are no list of codes of the codebook.
    """
    codes = torch.as_tensor(used)
    whole = not codes.is_floating_point() and not codes.is_complex() and codes.dtype != torch.bool
    if codes.ndim != 1 or not len(codes) or not whole:
        raise ConfigError(
            f"used: expected code indices [n], got {codes.dtype} of {list(codes.shape)}"
        )
    if not codes.is_meta and not bool(((codes >= 0) & (codes < num_embeddings)).all()):
        raise ConfigError(
            f"used: expected code indices from 0 to {num_embeddings - 1}, "
            f"got {int(codes.min())} to {int(codes.max())}"
        )
    return codes.to(torch.int64)


def check_unknown_index(unknown_index: UnknownIndex) -> None:
    """Require "random", "extra" or an index ≥ 0.

    Raises:
        ConfigError: it is none of them.
    """
    index = isinstance(unknown_index, int) and not isinstance(unknown_index, bool)
    if unknown_index not in ("random", "extra") and not (index and int(unknown_index) >= 0):
        raise ConfigError(
            f"unknown_index: expected 'random', 'extra' or an index, got {unknown_index!r}"
        )


def remap_to_used(indices: Tensor, used: Tensor, unknown_index: UnknownIndex) -> Tensor:
    """Positions in `used` of the codes `indices`, int64 of the same shape.

    Args:
        indices: codes, int64 of any shape.
        used: int64 [n]; of a code that is in it twice, the first position counts.
        unknown_index: what the other codes get: ``"random"`` positions, drawn from torch's global
            generator of the CPU, ``"extra"``: the further position n, or a position.
    """
    ordered, position = used.sort(stable=True)
    place = torch.searchsorted(ordered, indices.contiguous()).clamp(max=len(used) - 1)
    result, unknown = position[place], ordered[place] != indices
    if unknown_index == "random":
        count = int(unknown.sum())
        result[unknown] = torch.randint(0, len(used), (count,)).to(result.device)
        return result
    other = len(used) if unknown_index == "extra" else int(unknown_index)
    return result.masked_fill(unknown, other)


def unmap_to_all(indices: Tensor, used: Tensor) -> Tensor:
    """Codes of positions in `used`; the extra position stands for the first of them.

    Args:
        indices: int64 of any shape, from 0 to n.
        used: int64 [n].
    """
    return used[indices.masked_fill(indices == len(used), 0)]
