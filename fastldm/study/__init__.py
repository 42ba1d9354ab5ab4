"""Quality against cost: one budget spent at each f; each part is loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastldm.study.config import StudyConfig
    from fastldm.study.run import run_study

_MODULE_OF = {"StudyConfig": "config", "run_study": "run"}

__all__ = ["StudyConfig", "run_study"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
