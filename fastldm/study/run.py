"""A study from its first training to its report; what is finished is not done again."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastldm.data import load_images
from fastldm.errors import ConfigError, DataError
from fastldm.latent_diffusion import LatentDiffusion
from fastldm.models import IdentityFirstStage
from fastldm.storage import read_json, write_json
from fastldm.study.cells import Cell, cells_of, diffusion_training, first_stage_training
from fastldm.study.config import StudyConfig
from fastldm.study.costs import TFLOP, Costs, Plan, measure_costs, plan
from fastldm.study.evaluation import (
    Material,
    SampleDistance,
    draw_samples,
    load_material,
    make_lpips,
    measure_bound,
    measure_first_stage,
    measure_reconstructions,
)
from fastldm.study.pca import PrincipalComponents
from fastldm.study.report import write_report
from fastldm.training.autoencoder import train_autoencoder
from fastldm.training.checkpointing import CheckpointReader, list_checkpoints
from fastldm.training.config import save_config, to_plain
from fastldm.training.environment import Environment
from fastldm.training.latent_diffusion import train_latent_diffusion
from fastldm.training.logging import ProgressBar, format_seconds
from fastldm.training.registry import load_first_stage

logger = logging.getLogger(__name__)

_CONFIG = "study.yaml"
_CELL = "cell.json"
_MAY_CHANGE = ("output_dir", "kl", "vq", "pixel", "overwrite", "cpu", "progress_bar")
"""Fields that may differ when a study goes on: cells may be added, and all else be where it was."""


def run_study(config: StudyConfig) -> Path:
    """Train and measure every cell, and write tables, plots and the report.

    Interrupted, the same call goes on: trainings from their checkpoints, and measurements and cells
    that are finished are kept.

    Returns:
        the report, ``<output_dir>/report.md``.

    Raises:
        ConfigError: the budget is too small, `output_dir` holds another study, or a model's or
            metric's configuration is refused.
        DataError: the images cannot be used.
        CheckpointError: a file of weights is damaged.
        TrainingError: a loss became NaN or infinite, or the disk is full.
    """
    cells = cells_of(config)
    _check_folder(config)
    dataset = load_images(config.data, augment=False)
    try:
        num_images = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise DataError("data: a study needs random access; streams have none") from None
    logger.info("counting what a step costs, for %d models", len(cells))
    costs = {cell: measure_costs(cell, config, num_images) for cell in cells}
    plans = {cell: plan(cell, config, costs[cell]) for cell in cells}
    _begin(config)
    material = load_material(config)
    device = Environment(diffusion_training(cells[0], config, Path("unused"), max_steps=1)).device
    distance = SampleDistance(config, material.reference, device)
    _, lpips = make_lpips(config.evaluation)
    progress = _Progress(len(cells), enabled=config.progress_bar)
    records = [
        _CellRun(cell, config, costs[cell], plans[cell], material, distance, progress, device).run()
        for cell in cells
    ]
    progress.close()
    results = {
        "config": to_plain(config),
        "distance": distance.name,
        "lpips": lpips,
        "images": {
            "training": num_images,
            "reference": len(material.reference),
            "held_out": len(material.held_out[: config.evaluation.images]),
        },
        "held_out_distance": distance(material.held_out),
        "machine": _machine(device),
        "cells": records,
        "pca": _measure_pca(cells, config, material),
    }
    return write_report(results, Path(config.output_dir))


def _check_folder(config: StudyConfig) -> None:
    """Refuse a folder with another study, unless that is to be deleted."""
    path = Path(config.output_dir, _CONFIG)
    if config.overwrite or not path.is_file():
        return
    import yaml

    then, now = yaml.safe_load(path.read_text(encoding="utf-8")), to_plain(config)
    changed = [name for name in now if name not in _MAY_CHANGE and then.get(name) != now[name]]
    if changed:
        raise ConfigError(
            f"output_dir: {config.output_dir} holds a study with another {', '.join(changed)}; "
            "choose another folder or set overwrite: true"
        )


def _begin(config: StudyConfig) -> None:
    """Note what the folder holds from now on."""
    if config.overwrite:
        shutil.rmtree(Path(config.output_dir, "cells"), ignore_errors=True)
    save_config(config, Path(config.output_dir, _CONFIG))


class _CellRun:
    """The phases of one cell, each of which notes in ``cell.json`` what it found."""

    def __init__(
        self,
        cell: Cell,
        config: StudyConfig,
        costs: Costs,
        plan: Plan,
        material: Material,
        distance: SampleDistance,
        progress: _Progress,
        device: torch.device,
    ) -> None:
        self.cell = cell
        self.config = config
        self.costs = costs
        self.plan = plan
        self.material = material
        self.distance = distance
        self.progress = progress
        self.folder = cell.folder(config)
        self.path = self.folder / _CELL
        self.device = device

    def run(self) -> dict[str, Any]:
        """All phases that are not finished; gives the cell's figures."""
        self.record: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}
        self._note(
            name=self.cell.name,
            f=self.cell.f,
            regularization=self.cell.regularization,
            costs=self.costs.to_plain(),
        )
        share = 0.0 if self.cell.is_pixel else self.config.first_stage_share
        self._phase("first_stage", "first stage", share, self._first_stage)
        points = len(self.plan.points)
        for number in range(points):
            name = f"point_{number}"
            what = f"diffusion, point {number + 1} of {points}"
            measure = functools.partial(self._point, number)
            self._phase(name, what, (1 - share) / points, measure)
        self._phase("rate_distortion", "variational bound", 0.0, self._bound)
        return self._with_costs(points)

    def _with_costs(self, points: int) -> dict[str, Any]:
        """The record, its points as a list, with the costs of what was trained."""
        costs = self.costs
        figures = {key: value for key, value in self.record.items() if "point_" not in key}
        stage = figures["first_stage"]
        figures["first_stage"] = {**stage, "tflop": costs.first_stage(stage["steps"]) / TFLOP}
        curve = [dict(self.record[f"point_{number}"]) for number in range(points)]
        for point in curve:
            point["tflop"] = (point["steps"] * costs.diffusion_step + costs.encoding) / TFLOP
        steps = self.config.evaluation.num_inference_steps
        sampling = (steps * costs.denoising + costs.decoding) / TFLOP
        return {**figures, "curve": curve, "sampling_tflop": sampling}

    def _phase(self, name: str, what: str, weight: float, measure: Callable[[], Any]) -> None:
        self.progress.begin(f"{self.cell.name}: {what}")
        done_before = name in self.record
        if not done_before:
            self._note(**{name: measure()})
        self.progress.finish(weight, counts=not done_before)

    def _note(self, **values: Any) -> None:
        self.record |= values
        write_json(self.path, self.record)

    def _first_stage(self) -> dict[str, Any]:
        if self.cell.is_pixel:
            stage = IdentityFirstStage(self.config.data.channels)
            stage.save_pretrained(self.folder / "first_stage" / "final")
            return {"steps": 0, "seconds": 0.0}
        training = first_stage_training(self.cell, self.config, **self.plan.first_stage)
        final = train_autoencoder(training)
        steps, seconds = _progress_of(training.output_dir)
        figures = measure_first_stage(
            load_first_stage(final).to(self.device),
            self.material,
            self.config.evaluation,
            self.folder / "reconstructions.png",
        )
        return {"steps": steps, "seconds": seconds, **figures}

    def _point(self, number: int) -> dict[str, Any]:
        limit = self.plan.points[number]
        training = diffusion_training(
            self.cell, self.config, self.folder / "first_stage" / "final", **limit
        )
        train_latent_diffusion(training)
        steps, seconds = _progress_of(training.output_dir)
        samples, sampling = draw_samples(self._model(), self.config, self.folder / "samples.png")
        return {
            "steps": steps,
            "seconds": seconds,
            "distance": self.distance(samples),
            "sampling_seconds_per_image": sampling / len(samples),
        }

    def _bound(self) -> dict[str, Any]:
        return measure_bound(self._model(), self.cell, self.config, self.material.held_out)

    def _model(self) -> LatentDiffusion:
        model = LatentDiffusion.from_pretrained(self.folder / "diffusion" / "final")
        return model.to(self.device)


def _progress_of(output_dir: str) -> tuple[int, float]:
    """Steps and seconds of a training, from its newest checkpoint."""
    state = CheckpointReader(list_checkpoints(output_dir)[-1]).state
    return int(state["step"]), float(state["elapsed_seconds"])


def _measure_pca(
    cells: list[Cell], config: StudyConfig, material: Material
) -> list[dict[str, Any]]:
    """Reconstructions by as many principal components as each cell's latents have numbers."""
    pca = PrincipalComponents(material.reference)
    side = config.data.resolution
    found = []
    for f, channels in sorted(
        {(cell.f, cell.latent_channels(config)) for cell in cells if not cell.is_pixel}
    ):
        numbers = channels * (side // f) ** 2
        figures = measure_reconstructions(
            material.held_out,
            lambda images, numbers=numbers: (pca.reconstruct(images, numbers), None),
            config.evaluation,
        )
        components = pca.components(numbers)
        found.append({"f": f, "numbers": numbers, "components": components, **figures})
    return found


def _machine(device: torch.device) -> dict[str, Any]:
    """What the times were taken on."""
    import platform

    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


class _Progress:
    """The share of the study that is done, and the time left by what this call has done."""

    def __init__(self, cells: int, *, enabled: bool) -> None:
        self._bar = ProgressBar("study", enabled=enabled)
        self._total = float(cells)
        self._done = 0.0
        self._done_here = 0.0
        self._started = time.monotonic()
        self._what = ""

    def begin(self, what: str) -> None:
        """Name what is being done."""
        self._what = what
        self._show()

    def finish(self, weight: float, *, counts: bool) -> None:
        """Add a phase; `counts` is false for what an earlier call had done."""
        self._done += weight
        self._done_here += weight if counts else 0.0
        self._show()

    def close(self) -> None:
        """Leave the bar."""
        self._bar.close()

    def _show(self) -> None:
        left = None
        if self._done_here:
            elapsed = time.monotonic() - self._started
            left = elapsed / self._done_here * (self._total - self._done)
        text = f"{self._what} · {format_seconds(left)} left"
        self._bar.update(self._done / self._total, text)
