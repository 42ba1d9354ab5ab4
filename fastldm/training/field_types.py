"""Values of a configuration against the types of a constructor's arguments."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from fastldm.errors import ConfigError


def check_types(kind: type, values: Mapping[str, Any], place: str) -> None:
    """Require values of the types that a class's constructor declares.

    Names that it does not have are left to `ConfigMixin.from_config`.

    Args:
        kind: the class.
        values: by argument name, as YAML gives them: sequences are lists.
        place: where the values were given, for errors.

    Raises:
        ConfigError: a value has another type.
    """
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            accepted = _described(hints[name])
            raise ConfigError(f"{place}.{name}: expected {accepted}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(
            any(_fits(entry, choice) for choice in arguments) for entry in value
        )
    if hint in (int, float):
        numbers = int | float if hint is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _described(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return name.replace("collections.abc.Sequence", "list").replace("typing.", "")
