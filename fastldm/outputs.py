"""Outputs that read by name, by position and as a tuple, as diffusers' outputs do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class BaseOutput:
    """A dataclass whose fields can also be read by index or key and unpacked in order.

    Fields that are ``None`` are skipped by position, so that an optional last field does not
    change how many values an unpacking expects.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not ``None``, in order of definition."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Any:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())
