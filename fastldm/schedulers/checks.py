"""Checks of config fields."""

from __future__ import annotations

import torch

from fastldm.errors import ConfigError

TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raise ConfigError where `value` is not an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{name}: got {value!r}; accepted: an integer of at least {minimum}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise ConfigError where `value` is not a number from `low` to `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"{name}: got {value!r}; accepted: a number from {low:g} to {high:g}")


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise ConfigError where `value` is not one of `accepted`."""
    if value not in accepted:
        raise ConfigError(f"{name}: got {value!r}; accepted: {', '.join(accepted)}")
