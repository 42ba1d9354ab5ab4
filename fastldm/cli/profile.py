"""``fastldm profile``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastldm.cli.common import write_errors
from fastldm.cli.parsing import parse_config
from fastldm.profiling.config import ProfileConfig
from fastldm.profiling.report import text
from fastldm.profiling.runner import Profile

_QUICK = "--quick"


def run(arguments: Sequence[str]) -> None:
    """Count and measure, write the report, and print its tables."""
    config = parse_config(
        ProfileConfig,
        list(_with_value(arguments)),
        "profile",
        "What diffusion costs at each downsampling factor, counted and measured.",
    )
    with write_errors(f"the profile in {config.output_dir}"):
        report = Profile(config).run()
    print(text(report))
    print(f"written to {config.output_dir}: index.html, profile.json, profile.csv, PNG and SVG")


def _with_value(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, of which ``--quick`` may stand alone."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        alone = word == _QUICK and following not in ("true", "false")
        yield f"{_QUICK}=true" if alone else word
