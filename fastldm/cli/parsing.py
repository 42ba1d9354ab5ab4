"""Typed dataclass configurations from YAML files and the command line, by jsonargparse."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from fastldm.errors import ConfigError

_Config = TypeVar("_Config")


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
    try:
        namespace = parser.parse_args(list(arguments))
        # FastLDM's own errors are raised in the dataclasses' checks.
        values = parser.instantiate(namespace)
    except argparse.ArgumentError as error:
        raise ConfigError(_plain(error)) from None
    return kind(**{name: value for name, value in vars(values).items() if name != "config"})


def build_parser(kind: type, command: str, description: str) -> Any:
    """The parser of a configuration class; it raises rather than exits."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=f"fastldm {command}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _plain(error: argparse.ArgumentError) -> str:
    """The message on one line, types by their bare names."""
    text = " ".join(str(error).split())
    return re.sub(r"Expected a <class '(\w+)'>", r"expected a value of type \1", text)
