"""Checkpoints that are whole or absent, and hold everything a run needs to go on bit for bit.

A checkpoint is the folder ``checkpoint-<step>``: model folders, ``optimizers.pt``, a file of
random-number states, ``state.json`` and ``manifest.json``, which lists every file with its size.
It is written under a temporary name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import errno
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastldm.errors import CheckpointError, ConfigError, TrainingError
from fastldm.models.weights import check_state_dict
from fastldm.storage import (
    atomic_directory,
    load_weights,
    pickle_problem,
    read_json,
    recover_directory,
    remove_directory,
    save_weights,
    write_json,
)

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_LEFTOVER = re.compile(r"\.(?:tmp|old)-(checkpoint-\d+)")


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(output_dir, f"checkpoint-{step}")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first; what a crash left behind is cleaned up."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    leftovers = {match[1] for entry in folder.iterdir() if (match := _LEFTOVER.match(entry.name))}
    for name in leftovers:
        recover_directory(folder / name)
    steps = [
        int(match[1])
        for entry in folder.iterdir()
        if (match := _NAME.fullmatch(entry.name)) and (entry / _MANIFEST).is_file()
    ]
    return [checkpoint_path(folder, step) for step in sorted(steps)]


def find_checkpoint(output_dir: str | Path, resume: str, *, overwrite: bool = False) -> Path | None:
    """The checkpoint that ``resume`` names, or None to start anew.

    Raises:
        CheckpointError: the path it gives holds no checkpoint.
        ConfigError: ``none`` would mix a new run with the checkpoints of an old one.
    """
    existing = list_checkpoints(output_dir)
    if resume == "latest":
        return existing[-1] if existing else None
    if resume == "none":
        if existing and not overwrite:
            raise ConfigError(
                f"output_dir: {output_dir} holds {existing[-1].name} of an earlier run; go on with "
                "resume: latest, choose another folder, or set overwrite: true"
            )
        return None
    if not Path(resume, _MANIFEST).is_file():
        raise CheckpointError(
            f"resume: expected latest, none or the path of a checkpoint; {resume} is none of them"
        )
    return Path(resume)


class CheckpointWriter:
    """Collects the parts of one checkpoint in its temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, module: nn.Module) -> None:
        """Store the parameters and buffers of a module; nothing if it has none."""
        save_weights(module.state_dict(), self.folder / f"{name}.safetensors")

    def json(self, name: str, value: Any) -> None:
        """Store a JSON value; floats keep every bit."""
        write_json(self.folder / f"{name}.json", value)

    def tensors(self, name: str, value: Any) -> None:
        """Store plain containers of tensors and numbers."""
        torch.save(value, self.folder / f"{name}.pt")


class CheckpointReader:
    """Reads the parts of one checkpoint, every file checked against the manifest first.

    Raises:
        CheckpointError: a file is missing or has another size than when it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json(folder / _MANIFEST)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or manifest.get("format") != FORMAT:
            raise CheckpointError(f"{folder / _MANIFEST}: not a manifest of format {FORMAT}")
        for name, size in files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing from the checkpoint")
            if path.stat().st_size != size:
                raise CheckpointError(
                    f"{path}: damaged: {path.stat().st_size} bytes where {size} were written"
                )
        self.state: dict[str, Any] = read_json(folder / _STATE)

    def module(self, name: str, module: nn.Module) -> None:
        """Load a module in place.

        Raises:
            CheckpointError: the file is damaged or of another architecture.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"{self.folder}: its run had no {name} and this one has; resume with the "
                f"configuration of that run, which is in {self.folder / _STATE}"
            )
        weights = load_weights(path)
        check_state_dict(weights, module.state_dict(), str(path))
        module.load_state_dict(weights)

    def json(self, name: str) -> Any:
        """A JSON value.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return read_json(self.folder / f"{name}.json")

    def tensors(self, name: str) -> Any:
        """Plain containers of tensors and numbers, read without running code.

        Raises:
            CheckpointError: the file is damaged or holds more than that.
        """
        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path}: {pickle_problem(error)}") from None


def write_checkpoint(output_dir: str | Path, step: int, state: dict[str, Any], parts: Any) -> Path:
    """Write ``checkpoint-<step>``.

    Args:
        state: JSON values: position in the data, elapsed time and the like.
        parts: called with a `CheckpointWriter`.

    Raises:
        TrainingError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = checkpoint_path(output_dir, step)
    try:
        with atomic_directory(path) as temporary:
            parts(CheckpointWriter(temporary))
            write_json(temporary / _STATE, {"step": step, **state})
            sizes = {
                str(file.relative_to(temporary)): file.stat().st_size
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            }
            write_json(temporary / _MANIFEST, {"format": FORMAT, "files": sizes})
    except Exception as error:
        if not is_write_error(error):
            raise
        kept = list_checkpoints(output_dir)
        raise TrainingError(
            f"step {step}: {path} could not be written ({write_error_reason(error)}); "
            + (
                f"{kept[-1].name} is kept: make room and go on with resume: latest"
                if kept
                else "there is no earlier checkpoint"
            )
        ) from error
    return path


def is_write_error(error: BaseException) -> bool:
    """Whether an exception says that the disk refused to be written.

    safetensors and torch wrap the operating system's error in types of their own.
    """
    if isinstance(error, OSError):
        return True
    text = str(error).lower()
    return any(
        sign in text
        for sign in ("no space left", "os error", "failed writing file", "unexpected pos")
    )


def write_error_reason(error: BaseException) -> str:
    """What to tell a user of a write error."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "no space left" in text.lower() or "unexpected pos" in text:
        return "no space left on the disk"
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def prune_checkpoints(output_dir: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for checkpoint in list_checkpoints(output_dir)[: -keep or None]:
        remove_directory(checkpoint)


def random_states() -> dict[str, Any]:
    """The states of all global random-number generators of this process, as plain values."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = state
    return {
        "python": random.getstate(),
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
