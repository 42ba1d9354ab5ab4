"""The loop around a trainer's steps: budget, logs, pictures, checkpoints, interruption, resume."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fastldm.errors import CheckpointError, NonFiniteLossError, TrainingError
from fastldm.storage import atomic_directory
from fastldm.training.batches import BatchStream
from fastldm.training.budget import Budget
from fastldm.training.checkpointing import (
    CheckpointReader,
    CheckpointWriter,
    checkpoint_path,
    is_write_error,
    list_checkpoints,
    prune_checkpoints,
    random_states,
    set_random_states,
    write_checkpoint,
    write_error_reason,
)
from fastldm.training.config import TrainingConfig, save_config, to_plain
from fastldm.training.environment import Environment
from fastldm.training.logging import MeanOfLogs, MetricsLogger, ProgressBar, format_seconds

logger = logging.getLogger(__name__)

FINAL = "final"
_DECIDE_THE_ORDER = ("data", "seed", "batch_size", "gradient_accumulation_steps")
"""Fields that a resumed run should share with the one that it goes on from."""


class Trainer(Protocol):
    """What a trainer of one stage gives to the loop."""

    description: str
    batches: BatchStream

    def train_step(self, step: int, progress: float) -> dict[str, Tensor]:
        """One optimiser step; returns scalars to log."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures on data that is not trained on."""
        ...

    def draw(self) -> dict[str, np.ndarray]:
        """Grids of pictures, uint8 [H, W, 3], by the name of their folder."""
        ...

    def save(self, writer: CheckpointWriter) -> None:
        """Store everything that changes in training."""
        ...

    def load(self, reader: CheckpointReader) -> None:
        """Take up what `save` stored."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model as a folder to load it from."""
        ...


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal and has written a checkpoint."""


def run_training(
    trainer: Trainer, config: TrainingConfig, environment: Environment, checkpoint: Path | None
) -> Path:
    """Train until the budget is used up, and export the model.

    Args:
        checkpoint: to go on from, or None.

    Returns:
        the folder of the trained model, ``<output_dir>/final``.

    Raises:
        NonFiniteLossError: a loss or gradient became NaN or infinite; checkpoints are kept.
        TrainingError: the disk is full; earlier checkpoints are kept.
        CheckpointError: `checkpoint` is damaged or of another architecture.
        Interrupted: after SIGINT or SIGTERM, when the checkpoint is written.
    """
    return _Run(trainer, config, environment).run(checkpoint)


class _Run:
    def __init__(self, trainer: Trainer, config: TrainingConfig, environment: Environment) -> None:
        self.trainer = trainer
        self.config = config
        self.environment = environment
        self.output_dir = Path(config.output_dir)
        self.budget = Budget(config.max_steps, config.max_minutes)
        self.means = MeanOfLogs(environment.device)
        self.saved_step: int | None = None

    def run(self, checkpoint: Path | None) -> Path:
        if checkpoint is not None:
            self._resume(checkpoint)
        elif self.environment.is_main:
            # A run to be overwritten: not before data and models have been found to serve.
            prune_checkpoints(self.output_dir, keep=0)
        metrics = None
        if self.environment.is_main:
            with _write_errors("the logs"):
                # First what fails cleanly: TensorBoard's thread shows a traceback of a full disk.
                save_config(self.config, self.output_dir / "config.yaml")
                metrics = MetricsLogger(
                    self.output_dir, self.budget.step, tensorboard=self.config.tensorboard
                )
        bar = ProgressBar(
            self.trainer.description,
            enabled=self.config.progress_bar and self.environment.is_main,
        )
        try:
            with _interruption() as interruption:
                self._steps(metrics, bar, interruption)
            return self._finish(metrics)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error}; {self._last_good_checkpoint()}") from None
        finally:
            bar.close()
            if metrics is not None:
                metrics.close()

    def _steps(
        self, metrics: MetricsLogger | None, bar: ProgressBar, interruption: threading.Event
    ) -> None:
        config, budget, environment = self.config, self.budget, self.environment
        while True:
            elapsed, interrupted = environment.agree(budget.elapsed, interruption.is_set())
            progress = budget.progress(elapsed)
            if interrupted:
                self._checkpoint()
                raise Interrupted(f"interrupted at step {budget.step}; go on with resume: latest")
            if progress >= 1.0:
                return
            self.means.add(self.trainer.train_step(budget.step, progress))
            if self.saved_step == budget.step:
                self._prune()
            budget.step += 1
            step = budget.step
            if step % config.log_every == 0:
                self._log(metrics)
            bar.update(budget.progress(), self._status())
            # What is measured and drawn at the end is not measured and drawn twice.
            if budget.progress() < 1.0:
                if _due(step, config.validate_every):
                    self._validate(metrics)
                if _due(step, config.sample_every):
                    self._draw(metrics)
            if _due(step, config.checkpoint_every):
                self._checkpoint()

    def _finish(self, metrics: MetricsLogger | None) -> Path:
        if self.saved_step != self.budget.step:
            self._checkpoint()
        self._prune()
        self._log(metrics)
        self._validate(metrics)
        self._draw(metrics)
        skipped = self.trainer.batches.skipped_count
        if skipped and self.environment.is_main:
            logger.warning("%d unreadable images were skipped", skipped)
        final = self.output_dir / FINAL
        if self.environment.is_main:
            with _write_errors(str(final)), atomic_directory(final) as folder:
                self.trainer.export(folder)
                save_config(self.config, folder / "config.yaml")
        self.environment.accelerator.wait_for_everyone()
        return final

    def _status(self) -> str:
        seconds = max(self.budget.elapsed, 1e-9)
        speed = self.budget.step * self._images_per_step / seconds
        left = format_seconds(self.budget.seconds_left())
        return f"step {self.budget.step} · {speed:.1f} images/s · {left} left"

    @property
    def _images_per_step(self) -> int:
        config = self.config
        micro_batches = config.gradient_accumulation_steps * self.environment.num_processes
        return config.batch_size * micro_batches

    def _log(self, metrics: MetricsLogger | None) -> None:
        values = self.means.take(self.environment.mean)
        if metrics is None or not values:
            return
        elapsed = self.budget.elapsed
        values["epoch"] = self.trainer.batches.epoch
        values["elapsed_seconds"] = elapsed
        values["images_per_second"] = self.budget.step * self._images_per_step / max(elapsed, 1e-9)
        with _write_errors(str(metrics.path)):
            metrics.log(self.budget.step, values)

    def _validate(self, metrics: MetricsLogger | None) -> None:
        if metrics is not None:
            values = self.trainer.validate()
            if values:
                with _write_errors(str(metrics.path)):
                    metrics.log(self.budget.step, values)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                logger.info("step %d: %s", self.budget.step, shown)

    def _draw(self, metrics: MetricsLogger | None) -> None:
        if metrics is None:
            return
        from PIL import Image

        for name, grid in self.trainer.draw().items():
            path = self.output_dir / name / f"step-{self.budget.step:07}.png"
            with _write_errors(str(path)):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grid).save(path)
                metrics.image(self.budget.step, name, grid)

    def _checkpoint(self) -> None:
        from accelerate.utils import gather_object

        states = gather_object([random_states()])
        if self.environment.is_main:

            def parts(writer: CheckpointWriter) -> None:
                self.trainer.save(writer)
                writer.tensors("random", states)

            state: dict[str, Any] = {
                "trainer": type(self.trainer).__name__,
                "elapsed_seconds": self.budget.elapsed,
                "epoch": self.trainer.batches.epoch,
                "batch": self.trainer.batches.batch,
                "config": to_plain(self.config),
            }
            write_checkpoint(self.output_dir, self.budget.step, state, parts)
        self.environment.accelerator.wait_for_everyone()
        self.saved_step = self.budget.step

    def _prune(self) -> None:
        """Delete old checkpoints, once the weights of the newest have given a finite loss."""
        if self.environment.is_main:
            prune_checkpoints(self.output_dir, self.config.keep_checkpoints)

    def _last_good_checkpoint(self) -> str:
        """What to go on from after a loss that is not finite."""
        kept = list_checkpoints(self.output_dir)
        now = checkpoint_path(self.output_dir, self.budget.step)
        good = [path for path in kept if path != now]
        if not kept:
            return "no checkpoint was written"
        text = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        return f"{text} ({now.name} holds the weights that gave this)" if now in kept else text

    def _read(self, checkpoint: Path) -> CheckpointReader:
        try:
            return CheckpointReader(checkpoint)
        except CheckpointError as error:
            others = [path for path in list_checkpoints(self.output_dir) if path != checkpoint]
            if not others:
                raise
            raise CheckpointError(
                f"{error}; go on from another with resume: {others[-1]}"
            ) from None

    def _resume(self, checkpoint: Path) -> None:
        reader = self._read(checkpoint)
        writer, own = reader.state["trainer"], type(self.trainer).__name__
        if writer != own:
            raise CheckpointError(f"{checkpoint}: written by {writer}, cannot be resumed by {own}")
        self.trainer.load(reader)
        state = reader.state
        self.trainer.batches.restart(state["epoch"], state["batch"])
        states = reader.tensors("random")
        if len(states) == self.environment.num_processes:
            set_random_states(states[self.environment.process_index])
        else:
            logger.warning(
                "%s was written by %d processes and is read by %d: dropout will differ",
                checkpoint, len(states), self.environment.num_processes,
            )  # fmt: skip
        then, now = state["config"], to_plain(self.config)
        changed = [name for name in _DECIDE_THE_ORDER if then.get(name) != now.get(name)]
        if changed:
            logger.warning("%s was written with another %s", checkpoint, ", ".join(changed))
        self.budget.restart(state["step"], state["elapsed_seconds"])
        self.saved_step = state["step"]
        logger.info("resumed from %s", checkpoint)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _write_errors(what: str) -> Iterator[None]:
    """Turn a full disk into an error that names what could not be written."""
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        raise TrainingError(
            f"{what} could not be written ({write_error_reason(error)}); checkpoints are kept"
        ) from error


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(_number: int, _frame: Any) -> None:
        event.set()
        restore()

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        restore()
