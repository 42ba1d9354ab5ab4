"""One small profile, measured once, for all tests of what is made of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from fastldm.profiling import costs, device, runner
from fastldm.profiling.config import ProfileConfig

CachedCosts = functools.cache(costs.ldm_costs)


def small(output_dir: Path, **changes: Any) -> ProfileConfig:
    """Three models of 32² images that take milliseconds a step."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "quick": True,
        "f": [1, 4],
        "image_size": 32,
        "steps": 5,
        "first_stage_channels": 8,
        "device": "cpu",
        "seconds_per_measurement": 0.05,
        "max_minutes": 60.0,
        "max_batch_size": 2,
        "progress_bar": False,
        **changes,
    }
    return ProfileConfig(**options)


@pytest.fixture
def quick_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are counted once for all tests, and roofs on small operands."""
    _speed_up(monkeypatch)


def _speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ldm_costs", CachedCosts)
    monkeypatch.setattr(device, "_COPIED_BYTES", {"cpu": 2**22})
    monkeypatch.setattr(device, "_SIDES", {"cpu": (128,)})


@pytest.fixture(scope="session")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report, and the folder that it was written to."""
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _speed_up(monkeypatch)
        report = runner.Profile(small(folder)).run()
    return report, folder
