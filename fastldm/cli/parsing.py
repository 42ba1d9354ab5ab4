"""Typed dataclass configurations from YAML files and the command line, by jsonargparse."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fastldm.cli.messages import option_names, plain_message
from fastldm.errors import ConfigError, FastLDMError

_Config = TypeVar("_Config")
_STRICT = ("--strict", "--data.strict=true")
"""A flag, and what it is short for."""
_CONFIG = "--config="
_SHIPPED = "configs/"
_INSTALLED = "share/fastldm/"
"""Where an installation puts the folder `_SHIPPED`; pyproject.toml says so, too."""


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
    words = list(_words(arguments))
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

    # The help of an option is the docstring of its field.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    strict = f"{_STRICT[0]}: short for {_STRICT[1]}, stop at an unreadable image."
    parser = jsonargparse.ArgumentParser(
        prog=f"fastldm {command}",
        description=description,
        epilog=strict if "data.strict" in option_names(kind) else None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(kind, as_group=False)
    return parser


def find_config(path: str) -> str:
    """The path itself, or that of a file of ours where there is none of its name.

    So ``configs/examples/folder-kl.yaml`` is found from every folder: beside the package in a
    checkout, and where the installer put it elsewhere.
    """
    if not path.startswith(_SHIPPED) or Path(path).is_file():
        return path
    beside = Path(__file__).parents[2] / path
    if beside.is_file():
        return str(beside)
    for file in metadata.files("fastldm") or ():
        if file.as_posix().endswith(_INSTALLED + path):
            return str(file.locate())
    return path


def _words(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with flags written out, and each configuration file as one word."""
    rest = iter(arguments)
    for word in rest:
        if word == _STRICT[0]:
            yield _STRICT[1]
        elif word.startswith(_CONFIG) or word == _CONFIG[:-1]:
            path = word.removeprefix(_CONFIG) if word.startswith(_CONFIG) else next(rest, None)
            yield _CONFIG[:-1] if path is None else _CONFIG + find_config(path)
        else:
            yield word


def _config_files(words: list[str]) -> list[str]:
    return [word.removeprefix(_CONFIG) for word in words if word.startswith(_CONFIG)]
