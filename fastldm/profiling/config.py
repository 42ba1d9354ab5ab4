"""The settings of a profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from fastldm.errors import ConfigError
from fastldm.profiling.specs import (
    FACTORS,
    NARROW_BASE_CHANNELS,
    NARROW_FIRST_STAGE_CHANNELS,
    REGULARIZATIONS,
    LDMSpec,
    pairs,
)

_QUICK_SECONDS = 0.2
_QUICK_MINUTES = 2.6
"""The rest of three is for the report."""
_SECONDS = 10.0


@dataclass(kw_only=True)
class ProfileConfig:
    """What is profiled, and how long it may take.

    Raises:
        ConfigError: a value is not accepted.
    """

    output_dir: str = "outputs/profile"
    """Folder of the report; what was measured there before is not measured again."""
    quick: bool = False
    """Narrow models of the same shape, and few repeats."""
    f: list[int] = field(default_factory=lambda: list(FACTORS))
    """Downsampling factors: 1 (pixels), 2, 4, 8, 16, 32."""
    regularizations: list[str] = field(default_factory=lambda: list(REGULARIZATIONS))
    """Kinds of first stages: kl, vq."""
    conditioning: Literal["none", "class"] = "none"
    """Table 14's unconditional UNets, or Table 13's class-conditional ones."""
    image_size: int = 256
    """Side of the images in pixels."""
    steps: int = 200
    """Denoising steps of an image."""
    base_channels: int | None = None
    """Channels of the UNets' first level; by default the paper's, with --quick 32."""
    first_stage_channels: int | None = None
    """Channels of the first stages' first level; by default 128, with --quick 16."""
    device: str | None = None
    """cpu, cuda or cuda:1; by default a GPU where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of sampling, and of autocast in training."""
    measure: bool = True
    """Measure, too, and not only count."""
    max_batch_size: int = 64
    """The largest batch that is tried."""
    max_minutes: float | None = None
    """Nothing is begun that would take longer than what is left of them; by default unlimited, with
    --quick 2.6."""
    seconds_per_measurement: float | None = None
    """Repeats of a call take about so long; 10, with --quick 0.2."""
    memory_gb: float | None = None
    """Memory that may be used; by default what is free."""
    overwrite: bool = False
    """Measure anew what is there already."""
    progress_bar: bool = True
    """Show how far it is."""

    def __post_init__(self) -> None:
        for name in ("f", "regularizations"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one, got none")
        for name in ("steps", "max_batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}: expected an integer of at least 1, got {getattr(self, name)}"
                )
        for name in ("max_minutes", "memory_gb", "seconds_per_measurement"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}")
        for f in self.f:
            if f not in FACTORS:
                raise ConfigError(f"f: got {f}; accepted: {', '.join(map(str, FACTORS))}")
        for regularization in self.regularizations:
            if regularization not in REGULARIZATIONS:
                raise ConfigError(
                    f"regularizations: got {regularization!r}; "
                    f"accepted: {', '.join(REGULARIZATIONS)}"
                )
        if self.quick and self.base_channels is None:
            self.base_channels = NARROW_BASE_CHANNELS
        if self.quick and self.first_stage_channels is None:
            self.first_stage_channels = NARROW_FIRST_STAGE_CHANNELS
        if self.quick and self.max_minutes is None:
            self.max_minutes = _QUICK_MINUTES
        if self.seconds_per_measurement is None:
            self.seconds_per_measurement = _QUICK_SECONDS if self.quick else _SECONDS
        list(self.specs())

    @property
    def budget(self) -> float:
        """Seconds for the repeats of one call."""
        return self.seconds_per_measurement or _SECONDS

    def specs(self) -> Iterator[LDMSpec]:
        """One for each f and regularisation, by f."""
        for f, regularization in pairs(dict.fromkeys(self.f), dict.fromkeys(self.regularizations)):
            yield LDMSpec(
                f,
                regularization,
                self.conditioning,
                self.image_size,
                self.base_channels,
                self.first_stage_channels,
            )
