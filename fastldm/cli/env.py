"""``fastldm env``."""

from __future__ import annotations

from collections.abc import Sequence

from fastldm.errors import ConfigError


def run(arguments: Sequence[str]) -> None:
    """Print versions, devices and backends."""
    if arguments:
        raise ConfigError(f"env takes no options, got {' '.join(arguments)}")
    from fastldm import env

    env.main()
