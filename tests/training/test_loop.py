"""The loop: interruption, full disks, time budgets, processes that do not match."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.errors import TrainingError
from fastldm.storage import load_weights
from fastldm.training import loop, train_autoencoder
from fastldm.training.autoencoder import AutoencoderTrainer
from fastldm.training.budget import Budget
from fastldm.training.checkpointing import CheckpointWriter, list_checkpoints
from fastldm.training.loop import Interrupted

Make = Callable[..., Any]
Metrics = Callable[[str], list[dict[str, Any]]]


def at_step(step: int, action: Callable[[], None]) -> Callable[..., Any]:
    original = AutoencoderTrainer.train_step

    def train_step(self: AutoencoderTrainer, number: int, progress: float) -> Any:
        if number == step:
            action()
        return original(self, number, progress)

    return train_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    autoencoder_config: Make, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    action = at_step(1, lambda: signal.raise_signal(number))
    monkeypatch.setattr(AutoencoderTrainer, "train_step", action)
    config = autoencoder_config(max_steps=1000)
    with pytest.raises(Interrupted, match=r"interrupted at step 2; go on with resume: latest"):
        train_autoencoder(config)
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-2"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.undo()
    train_autoencoder(replace(config, max_steps=3, resume="latest"))
    assert (Path(config.output_dir) / "final").is_dir()


def test_the_second_signal_stops_at_once(
    autoencoder_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AutoencoderTrainer, "train_step", at_step(1, twice))
    config = autoencoder_config(max_steps=1000)
    # A shell starts its background jobs with SIGINT ignored.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            train_autoencoder(config)
    finally:
        signal.signal(signal.SIGINT, outside)
    assert not isinstance(caught.value, Interrupted)


def test_a_full_disk_stops_with_the_earlier_checkpoint(
    autoencoder_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CheckpointWriter.tensors
    calls = [0]

    def full(self: CheckpointWriter, name: str, value: Any) -> None:
        calls[0] += 1
        if calls[0] > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, name, value)

    monkeypatch.setattr(CheckpointWriter, "tensors", full)
    config = autoencoder_config(max_steps=4, checkpoint_every=2)
    with pytest.raises(TrainingError, match=r"step 4.*no space left.*checkpoint-2 is kept"):
        train_autoencoder(config)
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-2"]


def test_a_full_disk_for_the_logs_is_named(
    autoencoder_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastldm.training.logging import MetricsLogger

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLogger, "log", full)
    with pytest.raises(TrainingError, match=r"metrics.jsonl could not be written \(no space left"):
        train_autoencoder(autoencoder_config())


def test_old_checkpoints_are_deleted(autoencoder_config: Make) -> None:
    config = autoencoder_config(max_steps=5, checkpoint_every=1, keep_checkpoints=2)
    train_autoencoder(config)
    names = [path.name for path in list_checkpoints(config.output_dir)]
    assert names == ["checkpoint-4", "checkpoint-5"]


def test_minutes_are_a_budget(
    autoencoder_config: Make, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that goes on by 10 ms each time it is read, however fast the machine is.
    clock = functools.partial(next, itertools.count(0.0, 0.01))
    monkeypatch.setattr(loop, "Budget", functools.partial(Budget, clock=clock))
    config = autoencoder_config(max_steps=None, max_minutes=0.02, lr_schedule="linear")
    train_autoencoder(config)
    rates = [
        line["learning_rate"] for line in metrics(config.output_dir) if "learning_rate" in line
    ]
    assert rates == sorted(rates, reverse=True)
    assert 0 <= rates[-1] < rates[0] <= 1e-3
    last = metrics(config.output_dir)[-2]
    assert last["elapsed_seconds"] >= 0.02 * 60 - 0.1
    assert 5 < last["step"] < 60


def test_lines_hold_the_mean_over_their_steps(autoencoder_config: Make, metrics: Metrics) -> None:
    single = autoencoder_config("single", max_steps=6)
    several = autoencoder_config("several", max_steps=6, log_every=3)
    train_autoencoder(single)
    train_autoencoder(several)
    totals = [line["total"] for line in metrics(single.output_dir) if "total" in line]
    means = [line["total"] for line in metrics(several.output_dir) if "total" in line]
    assert means == pytest.approx([sum(totals[:3]) / 3, sum(totals[3:]) / 3], rel=1e-5)


def test_a_checkpoint_of_other_processes_can_be_read(
    autoencoder_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    import json

    config = autoencoder_config()
    train_autoencoder(config)
    folder = Path(config.output_dir, "checkpoint-3")
    states = torch.load(folder / "random.pt", weights_only=True)
    torch.save(states * 2, folder / "random.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["random.pt"] = (folder / "random.pt").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    train_autoencoder(replace(config, max_steps=4, resume="latest", seed=1))
    assert "written with another seed" in caplog.text
    assert "written by 2 processes and is read by 1" in caplog.text
    assert len(load_weights(Path(config.output_dir, "checkpoint-4", "model.safetensors"))) > 0


def test_without_held_out_images_it_says_so(
    autoencoder_config: Make, data: Make, caplog: pytest.LogCaptureFixture
) -> None:
    train_autoencoder(autoencoder_config(data=data(holdout_fraction=0.0), max_steps=1))
    assert "nothing is held out" in caplog.text
