"""Metrics to ``metrics.jsonl`` and TensorBoard, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.storage import atomic_file

_EVENTS = "tensorboard"


class MetricsLogger:
    """Appends one JSON object a line; values that are not finite are written as strings.

    Args:
        output_dir: holds ``metrics.jsonl`` and ``tensorboard/``.
        start_step: lines of later steps, from before a restart, are dropped.
        tensorboard: whether to write events.
    """

    def __init__(self, output_dir: Path, start_step: int, *, tensorboard: bool) -> None:
        self.path = output_dir / "metrics.jsonl"
        output_dir.mkdir(parents=True, exist_ok=True)
        self._drop_after(start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events: Any = None
        if start_step == 0:
            shutil.rmtree(output_dir / _EVENTS, ignore_errors=True)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                str(output_dir / _EVENTS), purge_step=start_step + 1 if start_step else None
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        plain = {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, grid: Any) -> None:
        """Show a grid, uint8 [H, W, 3], in TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, grid, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class MeanOfLogs:
    """Averages scalars on the device, so that they are fetched once a line.

    Args:
        device: where the values of all processes are averaged.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, logs: Mapping[str, Tensor]) -> None:
        """Count one more value of each name."""
        for name, value in logs.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call.

        Args:
            reduce: the mean of a tensor over all processes.
        """
        means = self.means()
        self._sums, self._counts = {}, {}
        if not means:
            return {}
        values = reduce(torch.stack([value.to(self._device) for value in means.values()]))
        return dict(zip(means, values.tolist(), strict=True))

    def means(self) -> dict[str, Tensor]:
        """The means since the last `take`, as scalars where the values were."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}


class ProgressBar:
    """Shows the share of the budget used, speed and time left; on a terminal or in a log file."""

    def __init__(self, description: str, *, enabled: bool) -> None:
        from tqdm.auto import tqdm

        interactive = sys.stderr.isatty() and not os.environ.get("CI")
        self._bar = tqdm(
            total=1.0,
            desc=description,
            unit="",
            disable=not enabled,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {unit}",
            mininterval=0.5 if interactive else 15.0,
            miniters=0,
            smoothing=0,
        )

    def update(self, progress: float, text: str) -> None:
        """Show a new state."""
        self._bar.unit = text
        self._bar.update(progress - self._bar.n)

    def close(self) -> None:
        """Draw the last state and leave it."""
        self._bar.refresh()
        self._bar.close()


def format_seconds(seconds: float | None) -> str:
    """``1:02:03``, ``02:03``, or ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
