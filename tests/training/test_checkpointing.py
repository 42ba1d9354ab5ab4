"""Checkpoints: whole or absent under kill −9 and full disks, refused when damaged or unsafe."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastldm.errors import CheckpointError, ConfigError, TrainingError
from fastldm.training import checkpointing
from fastldm.training.checkpointing import (
    CheckpointReader,
    CheckpointWriter,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    random_states,
    set_random_states,
    write_checkpoint,
)

ROOT = Path(__file__).parents[2]


def network(value: float) -> nn.Linear:
    module = nn.Linear(64, 64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def write(folder: Path, step: int, module: nn.Module | None = None) -> Path:
    def parts(writer: CheckpointWriter) -> None:
        writer.module("model", network(float(step)) if module is None else module)
        writer.tensors("optimizers", {"step": torch.tensor(step)})
        writer.json("scale", 0.1)

    return write_checkpoint(folder, step, {"epoch": 1}, parts)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, 7))
    module = network(0.0)
    reader.module("model", module)
    assert bool((module.weight == 7).all())
    assert reader.tensors("optimizers") == {"step": torch.tensor(7)}
    assert reader.json("scale") == 0.1
    assert reader.state == {"step": 7, "epoch": 1}


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert found.name == "checkpoint-100"
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_resume_values(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "new", "latest") is None
    assert find_checkpoint(tmp_path / "new", "none") is None
    path = write(tmp_path, 1)
    assert find_checkpoint(tmp_path / "new", str(path)) == path
    with pytest.raises(CheckpointError, match="expected latest, none or the path"):
        find_checkpoint(tmp_path, str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="overwrite"):
        find_checkpoint(tmp_path, "none")
    assert find_checkpoint(tmp_path, "none", overwrite=True) is None
    assert list_checkpoints(tmp_path) == [path]
    prune_checkpoints(tmp_path, 0)
    assert list_checkpoints(tmp_path) == []


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
from fastldm import storage
from fastldm.training import checkpointing
sys.path.insert(0, {tests!r})
import test_checkpointing as writer

folder = Path({folder!r})

def events_before_death(count):
    # Every write to the disk ends in one of these; the process dies just before one of them.
    left = [count]
    def dying(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)
        return call
    for module, names in ((os, ("fsync",)), (storage, ("save_file",)), (torch, ("save",)),
                          (Path, ("rename", "replace", "write_text", "mkdir", "unlink"))):
        for name in names:
            setattr(module, name, dying(getattr(module, name)))
    storage.shutil.rmtree = dying(storage.shutil.rmtree)

module = writer.network(2.0)
outcomes = []
for count in range(400):
    child = os.fork()
    if child == 0:
        events_before_death(count)
        writer.write(folder, 2, module)
        checkpointing.prune_checkpoints(folder, 5)
        os._exit(0)
    died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = checkpointing.find_checkpoint(folder, "latest")
    reader = checkpointing.CheckpointReader(found)
    loaded = writer.network(0.0)
    reader.module("model", loaded)
    step = reader.state["step"]
    assert bool((loaded.weight == step).all()), (count, step)
    assert bool(reader.tensors("optimizers")["step"] == step), (count, step)
    assert not list(folder.glob(".tmp-*")) and not list(folder.glob(".old-*")), count
    outcomes.append(step)
    if not died:
        break
    if count % 7 == 6 and (folder / "checkpoint-2").is_dir():
        checkpointing.shutil.rmtree(folder / "checkpoint-2")
print(len(outcomes), outcomes[0], outcomes[-1])
"""


def test_kill_9_at_every_point_of_writing_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    write(tmp_path, 1)
    code = KILLED_WRITER.format(
        root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path)
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    points, first, last = map(int, result.stdout.split())
    assert points > 20
    assert (first, last) == (1, 2)


@pytest.mark.parametrize("place", ["weights", "tensors", "fsync"])
def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"weights": "fastldm.storage.save_file", "tensors": "torch.save", "fsync": "os.fsync"}
    monkeypatch.setattr(target[place], full)
    with pytest.raises(TrainingError, match=r"step 2.*no space left.*checkpoint-1 is kept"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
    assert CheckpointReader(tmp_path / "checkpoint-1").state["step"] == 1


@pytest.mark.parametrize("part", ["module", "tensors"])
def test_a_write_that_the_system_refuses_keeps_the_previous_checkpoint(
    tmp_path: Path, part: str
) -> None:
    """A limit on the size of files, so that safetensors and torch raise errors of their own."""
    write(tmp_path, 1)

    def parts(writer: CheckpointWriter) -> None:
        if part == "module":
            writer.module("model", nn.Linear(512, 512))
        else:
            writer.tensors("optimizers", {"exp_avg": torch.zeros(512, 512)})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"step 2.*could not be written.*checkpoint-1"):
            write_checkpoint(tmp_path, 2, {}, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_the_error_of_torch_on_a_full_disk_is_known() -> None:
    """It does not name the cause; see `torch.serialization`'s zip writer."""
    error = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
    assert checkpointing.is_write_error(error)
    assert "disk" in checkpointing.write_error_reason(error)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def parts(_: CheckpointWriter) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_checkpoint(tmp_path, 1, {}, parts)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_deleting_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write(tmp_path, step)

    def killed(folder: Path, **_: Any) -> None:
        (folder / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt", "state.json"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 1)
    file = path / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{name}: damaged: \d+ bytes where \d+"):
        CheckpointReader(path)


def test_a_missing_file_and_a_foreign_manifest_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing"):
        CheckpointReader(path)
    (path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="not a manifest of format 1"):
        CheckpointReader(path)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"another architecture.*\[64, 64\].*\[8, 64\]"):
        reader.module("model", nn.Linear(64, 8))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    trace = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trace),)

    (path / "optimizers.pt").write_bytes(pickle.dumps(Malicious()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["optimizers.pt"] = (path / "optimizers.pt").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="refused"):
        CheckpointReader(path).tensors("optimizers")
    assert not trace.exists()


def test_random_states_come_back_through_a_file(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()

    random.gauss(0, 1)
    np.random.randn()
    torch.save(random_states(), tmp_path / "random.pt")
    expected = draw()
    draw()
    set_random_states(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draw() == expected
