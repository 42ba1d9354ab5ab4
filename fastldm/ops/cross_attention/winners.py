"""Where torch's scaled_dot_product_attention beats the Triton kernel, as measured.

``winners.json`` has, for each device (``sm_90``; ``default`` for those that are not named), the
classes of calls that scaled_dot_product_attention won::

    {"dtypes": ["float32"], "queries": [1, 64], "keys": [129, 256], "channels": [1, 160]}

with the least and the largest size of each. A class that nobody measured is the Triton kernel's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.ops._triton import device_key

Class = dict[str, Any]


def sdpa_classes(device: torch.device) -> tuple[Class, ...]:
    """The classes of calls on this device that scaled_dot_product_attention won."""
    table = _table()
    return tuple(table.get(device_key(device), table["default"]))


def is_one_of(classes: tuple[Class, ...], q: Tensor, k: Tensor) -> bool:
    """Whether a call with these queries and keys belongs to a class."""
    sizes = {"queries": q.shape[1], "keys": k.shape[1], "channels": q.shape[3]}
    dtype = str(q.dtype).removeprefix("torch.")
    return any(
        dtype in won["dtypes"]
        and all(won[name][0] <= size <= won[name][1] for name, size in sizes.items())
        for won in classes
    )


@functools.cache
def _table() -> dict[str, list[Class]]:
    text = Path(__file__).with_name("winners.json").read_text(encoding="utf-8")
    table: dict[str, list[Class]] = json.loads(text)
    return table
