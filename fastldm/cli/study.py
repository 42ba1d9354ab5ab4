"""``fastldm study``."""

from __future__ import annotations

from collections.abc import Sequence

from fastldm.cli.parsing import parse_config
from fastldm.study.config import StudyConfig


def run(arguments: Sequence[str]) -> None:
    """Train and measure one budget at each f, and print the path of the report."""
    config = parse_config(
        StudyConfig,
        arguments,
        "study",
        "Train first stages and diffusion models for several f under one budget, and draw quality "
        "against cost.",
    )
    from fastldm.study.run import run_study

    print(run_study(config))
