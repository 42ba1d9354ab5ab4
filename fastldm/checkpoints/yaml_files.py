"""CompVis's YAML files as plain values: nothing in them is built, called or looked up."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from fastldm.errors import CheckpointError, ConfigError

_MOST_BYTES = 2**16
_MOST_NESTING = 20
_MOST_ENTRIES = 10_000
_MOST_SHOWN = 60
_LARGEST = 2**31

_Fields = TypeVar("_Fields")


class _PlainLoader(yaml.SafeLoader):
    """Values only; no aliases, by which a short text can stand for an endless one, and no deep
    brackets, whose reading takes a time that grows with the square of their depth.
    """

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _MOST_NESTING:
            raise ConfigError(f"brackets inside brackets, more than {_MOST_NESTING} deep")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("an alias (*name), which is not accepted")
        return super().compose_node(parent, index)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of at most 64 KiB as dicts, lists, strings and numbers.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: it is not a YAML mapping, or holds tags or aliases.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes; accepted: at most {_MOST_BYTES}")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: not a plain YAML file: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping, got {type(value).__name__}")
    return value


def short(value: Any) -> str:
    """`value` for a message; containers by their type alone, since they may be of any depth."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def child(node: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """The mapping under `name`, or an empty one.

    Raises:
        ConfigError: there is something else under that name.
    """
    value = node.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}.{name}: expected a mapping, got {short(value)}")
    return value


def parse_fields(
    kind: type[_Fields], node: Mapping[str, Any], where: str, ignored: frozenset[str] = frozenset()
) -> _Fields:
    """`node` as the dataclass `kind`, whose annotations say what a value may be.

    Args:
        where: path of `node` in the file, for messages.
        ignored: names that have no effect on what the model gives.

    Raises:
        ConfigError: a name is unknown, or missing, or a value is of another type; it is named.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    unknown = [name for name in node if name not in fields and name not in ignored]
    if unknown:
        raise ConfigError(f"{where}: fastldm does not know {', '.join(map(short, unknown[:5]))}")
    values = {}
    for name, field in fields.items():
        if name in node:
            values[name] = _convert(node[name], hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: missing")
    return kind(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        converted = _try(value, option)
        if converted is not None or (value is None and option is type(None)):
            return converted
    names = " or ".join(_describe(option) for option in options)
    raise ConfigError(f"{where}: expected {names}, got {short(value)}")


def _try(value: Any, hint: Any) -> Any:
    """`value` as `hint`, or None where it is something else."""
    if get_origin(hint) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > _MOST_ENTRIES:
            return None
        entries = [_try(entry, get_args(hint)[0]) for entry in value]
        return None if any(entry is None for entry in entries) else tuple(entries)
    if hint is float:
        return _number(value)
    if hint is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return value if whole and abs(value) < _LARGEST else None
    return value if isinstance(hint, type) and isinstance(value, hint) else None


def _number(value: Any) -> float | None:
    """A finite number; YAML 1.1 takes "1e-4", which has no point, for a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _describe(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"a list of {_describe(get_args(hint)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(hint, "null" if hint is type(None) else str(hint))
