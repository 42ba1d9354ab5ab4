"""Typed dataclass configurations from YAML files and the command line, by jsonargparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from fastldm.cli.messages import plain_message
from fastldm.errors import ConfigError, FastLDMError

_Config = TypeVar("_Config")
_STRICT = ("--strict", "--data.strict=true")
"""A flag, and what it is short for."""


def parse_config(
    kind: type[_Config], arguments: Sequence[str], command: str, description: str
) -> _Config:
    """Build a configuration from ``--config FILE`` and dotted options, the later one winning.

    Args:
        kind: the dataclass.
        arguments: those after the command's name.
        command: the command's name, for the help text.
        description: what the command does, for the help text.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or is refused.
        SystemExit: ``--help`` was asked for and shown.
    """
    parser = build_parser(kind, command, description)
    words = [_STRICT[1] if word == _STRICT[0] else word for word in arguments]
    try:
        namespace = parser.parse_args(words)
        # FastLDM's own errors are raised in the dataclasses' checks.
        values = parser.instantiate(namespace)
    except FastLDMError:
        raise
    except (argparse.ArgumentError, ValueError) as error:
        raise ConfigError(plain_message(error, kind, _config_files(words))) from None
    return kind(**{name: value for name, value in vars(values).items() if name != "config"})


def build_parser(kind: type, command: str, description: str) -> Any:
    """The parser of a configuration class; it raises rather than exits."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=f"fastldm {command}",
        description=description,
        epilog=f"{_STRICT[0]}: short for {_STRICT[1]}, stop at an unreadable image.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _config_files(words: list[str]) -> list[str]:
    files = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return files + [after for word, after in pairwise(words) if word == "--config"]
