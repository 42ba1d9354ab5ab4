"""A whole profile: each f and regularisation counted and measured, results kept as they end."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastldm._version import __version__
from fastldm.profiling import paper
from fastldm.profiling.config import ProfileConfig
from fastldm.profiling.costs import LDMCosts, ldm_costs
from fastldm.profiling.device import Roofs, choose_device, device_name, measure_roofs, stamp
from fastldm.profiling.measuring import Conditions, measure, measure_ratio
from fastldm.profiling.report import write_report
from fastldm.profiling.specs import LDMSpec
from fastldm.storage import read_json, write_json

_TRAINING_CALLS = 7
_FIRST_STAGE_CALLS = 5
"""Calls of a measurement, beside the repeats of quick ones; sampling steps as parts of training."""
_REPEATED_CALLS = 8
_RATIO_OF = (1, 4)
_ROUNDS = 5
_EFFICIENCY = 0.4
"""Share of the matrix rate that a model reaches, roughly, to foresee a duration."""


class Profile:
    """Counts and measures what a configuration asks for.

    Args:
        config: see there.

    Raises:
        ConfigError: the device is not here.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self._config = config
        self._device = choose_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._folder = Path(config.output_dir)
        self._specs = list(config.specs())
        self._started = time.monotonic()
        self._roofs = self._measured_roofs() if config.measure else None

    def run(self) -> dict[str, Any]:
        """Do what is missing, and write the report.

        Returns:
            What ``profile.json`` holds: ``stamp``, ``settings``, ``roofs``, ``cells``, ``ratio``.

        Raises:
            KeyboardInterrupt: with a message that says how to go on; all that has ended is kept.
        """
        try:
            costs = self._count_all()
            ratio = self._ratio(costs)
            cells = self._measure_all(costs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what has ended is kept in {self._folder}, and the same command "
                "goes on from there"
            ) from None
        report = {
            "stamp": stamp(self._device, self._dtype),
            "settings": asdict(self._config),
            "roofs": self._roofs.as_dict() if self._roofs else None,
            "cells": cells,
            "ratio": ratio,
            "quoted": {"source": paper.SOURCE, "device": paper.DEVICE},
        }
        write_report(report, self._folder)
        return report

    def _count_all(self) -> dict[str, LDMCosts]:
        progress = self._progress(len(self._specs), "Counting")
        costs = {}
        for spec in self._specs:
            progress.set_postfix_str(spec.name)
            costs[spec.name] = ldm_costs(spec, self._dtype)
            progress.update()
        progress.close()
        return costs

    def _measure_all(self, costs: dict[str, LDMCosts]) -> list[dict[str, Any]]:
        # Every f once, then again with the other first stage; the cheap ones first, of which more
        # end in a given time.
        kinds = ["none", *self._config.regularizations]
        order = sorted(
            self._specs,
            key=lambda spec: (
                max(kinds.index(spec.regularization), 1),
                costs[spec.name].train.total_flops,
            ),
        )
        measured: dict[str, Any] = {}
        progress = self._progress(len(order) if self._config.measure else 0, "Measuring")
        for spec in order if self._config.measure else ():
            progress.set_postfix_str(spec.name)
            measured[spec.name] = self._kept(
                f"{spec.f}-{spec.regularization}",
                asdict(spec),
                self._expected_seconds(costs[spec.name]),
                lambda spec=spec: measure(spec, costs[spec.name], self._conditions()),  # type: ignore[misc]
            )
            progress.update()
        progress.close()
        return [
            {
                **_description(spec),
                "cost": costs[spec.name].as_dict(self._config.steps),
                "measured": measured.get(spec.name, {"not_measured": "measure: false"}),
            }
            for spec in self._specs
        ]

    def _ratio(self, all_costs: dict[str, LDMCosts]) -> dict[str, Any] | None:
        """Latents against pixels, for the first regularisation at f = 4; None without both."""
        chosen = [next((s for s in self._specs if s.f == f), None) for f in _RATIO_OF]
        if not self._config.measure or chosen[0] is None or chosen[1] is None:
            return None
        pixels, latents = chosen[0], chosen[1]
        costs = all_costs[pixels.name]
        conditions = self._conditions()
        problem = conditions.why_no_memory(
            f"training at f = 1 and {latents.f} at once", 2 * costs.training_memory(1)
        )
        if problem is not None:
            return {"not_measured": problem}

        def work() -> dict[str, Any]:
            progress = self._progress(_ROUNDS, f"f={latents.f} against f={pixels.f}", "round")
            found = measure_ratio(pixels, latents, conditions, _ROUNDS, progress.update)
            progress.close()
            return found

        return self._kept(
            "ratio",
            {"pixels": asdict(pixels), "latents": asdict(latents), "rounds": _ROUNDS},
            self._seconds_of((_ROUNDS + 1) * 1.5 * costs.train.total_flops),
            work,
        )

    def _kept(
        self, name: str, settings: dict[str, Any], seconds: float, work: Callable[[], Any]
    ) -> Any:
        """A result that is there already, or that of `work` where there is time for it."""
        keys = {"settings": settings, "conditions": self._measured_under()}
        digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]
        path = self._folder / "cells" / f"{name}-{digest}.json"
        if path.is_file() and not self._config.overwrite:
            return read_json(path)["result"]
        left = self._seconds_left()
        if left is not None and seconds > left:
            return {
                "not_measured": f"it takes about {seconds / 60:.1f} minutes, of which "
                f"{max(left, 0) / 60:.1f} are left of max_minutes"
            }
        result = work()
        write_json(path, {**keys, "result": result})
        return result

    def _measured_under(self) -> dict[str, Any]:
        """All that a result depends on, beside the models."""
        return {
            "steps": self._config.steps,
            "budget": self._config.budget,
            "max_batch_size": self._config.max_batch_size,
            "memory_gb": self._config.memory_gb,
            "dtype": self._config.dtype,
            "device": device_name(self._device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fastldm": __version__,
        }

    def _measured_roofs(self) -> Roofs:
        def work() -> dict[str, float]:
            return measure_roofs(self._device, self._dtype).as_dict()

        return Roofs(**self._kept("roofs", {}, -math.inf, work))

    def _conditions(self) -> Conditions:
        assert self._roofs is not None
        memory = self._config.memory_gb
        return Conditions(
            self._device,
            self._dtype,
            self._config.steps,
            self._config.budget,
            self._config.max_batch_size,
            None if memory is None else int(memory * 1e9),
            self._roofs,
        )

    def _expected_seconds(self, costs: LDMCosts) -> float:
        """How long `measure` will take, roughly."""
        first_stage = costs.decode.total_flops + costs.encode.total_flops
        work = _TRAINING_CALLS * costs.train.total_flops + _FIRST_STAGE_CALLS * first_stage
        return self._seconds_of(work) + _REPEATED_CALLS * self._config.budget

    def _seconds_of(self, flops: float) -> float:
        assert self._roofs is not None
        return flops / (_EFFICIENCY * self._roofs.flops_per_second)

    def _seconds_left(self) -> float | None:
        if self._config.max_minutes is None:
            return None
        return 60 * self._config.max_minutes - (time.monotonic() - self._started)

    def _progress(self, total: int, what: str, unit: str = "model") -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            total=total, desc=what, unit=unit, disable=not self._config.progress_bar or not total
        )


def _description(spec: LDMSpec) -> dict[str, Any]:
    row = spec.row
    return {
        "name": spec.name,
        "f": spec.f,
        "regularization": spec.regularization,
        "conditioning": spec.conditioning,
        "image_size": spec.image_size,
        "is_papers": spec.is_papers,
        "paper": {
            "table": spec.table,
            "printed_parameters_millions": row.printed_parameters,
            "counted_parameters_millions": row.counted_parameters,
        },
    }
