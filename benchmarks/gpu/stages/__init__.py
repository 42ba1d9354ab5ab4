"""The stages of ``python -m benchmarks.gpu``: one module each, with ``run(context)``.

`run` yields a row whenever it has found one; the row is stored at once. A row with ``problem`` says
that something is wrong; one with ``skipped`` what was not done, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """What is done in one process."""

    name: str
    """Of its module in this package, and of its files."""
    limit: float
    """Seconds after which it is stopped, unless others are given."""


# In the order in which their results are needed.
STAGES = (
    Stage("environment", 60),
    Stage("build", 240),
    Stage("roofs", 60),
    Stage("gpu_tests", 420),
    Stage("group_norm_silu", 210),
    Stage("cross_attention", 150),
    Stage("diffusion_step", 60),
    Stage("vector_quantize", 60),
    Stage("geglu", 60),
    Stage("models", 240),
    Stage("throughput", 240),
    Stage("sanitizer", 240),
    Stage("winners", 180),
    Stage("tuning", 240),
    Stage("attention_tuning", 180),
)
NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class Context:
    """What a stage is given."""

    device: str
    """"cuda", or "cpu" for a dry run at sizes that take no time."""
    out: Path
    limit: float
    """Seconds that the stage has."""

    @property
    def is_dry(self) -> bool:
        """Whether this is no measurement of a GPU."""
        return self.device != "cuda"
