"""Files that are either whole or not there, and weights that never run code when read.

A folder is written under a temporary name in the same parent, every file and the folder itself is
flushed to the disk, and only then renamed: a crash at any point leaves the previous folder as it
was. Weights are read from safetensors, or from a pickle by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastldm.errors import CheckpointError

_TEMPORARY_PREFIX = ".tmp-"
_RETIRED_PREFIX = ".old-"
_REFUSED_CODE = re.compile(r"GLOBAL (\S+) (?:was|whose)")
_TORCH_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _fsync(Path(folder, name))
        _fsync(Path(folder))


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into; on success it becomes `path`, on failure nothing does.

    An existing `path` is replaced: it is renamed aside just before the new folder takes its name
    and deleted after. A reader that starts between the two renames finds no folder at `path`,
    never half of one; `recover_directory` puts the old one back after a crash there.

    Raises:
        OSError: the folder cannot be written (for example, no space left); `path` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    temporary.chmod(0o755)
    retired = path.parent / f"{_RETIRED_PREFIX}{path.name}"
    try:
        yield temporary
        _fsync_tree(temporary)
        if path.exists():
            if retired.exists():
                shutil.rmtree(retired)
            path.rename(retired)
        temporary.rename(path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if retired.exists() and not path.exists():
            retired.rename(path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def recover_directory(path: str | Path) -> None:
    """Put back what a crash inside `atomic_directory` left aside, and delete its leftovers."""
    path = Path(path)
    retired = path.parent / f"{_RETIRED_PREFIX}{path.name}"
    if retired.exists():
        if path.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(path)
    for leftover in path.parent.glob(f"{_TEMPORARY_PREFIX}{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_directory(path: str | Path) -> None:
    """Delete a folder at once; `recover_directory` deletes what a crash on the way leaves."""
    path = Path(path)
    doomed = path.parent / f"{_TEMPORARY_PREFIX}{path.name}-removed"
    path.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary file name beside `path`; on success it is flushed and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON; the message names it.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})") from None


def save_weights(
    tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to one safetensors file, atomically.

    Tensors are moved to the CPU and made contiguous; tensors that share memory are copied.
    """
    independent: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        independent[name] = value.clone() if value.numel() and pointer in seen else value
        seen.add(pointer)
    with atomic_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(independent, temporary, metadata={"format": "pt", **(metadata or {})})
        # safetensors leaves a file that only its owner may read, whatever the umask.
        temporary.chmod(mode)


def load_weights(path: str | Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read tensors from a ``.safetensors`` file, or a ``.ckpt``/``.pt``/``.pth``/``.bin`` pickle.

    A pickle is only ever read with ``weights_only=True``, so code inside it is not run; a nested
    ``state_dict`` entry, as training frameworks write it, is unwrapped.

    Raises:
        CheckpointError: the file is missing, truncated, not a weights file, or holds objects
            other than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device=str(device))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: damaged or not a safetensors file ({error}); copy or download it again"
            ) from None
    return _load_pickle(path, device)


def pickle_problem(error: Exception) -> str:
    """What to tell a user whose pickle ``torch.load(weights_only=True)`` refuses.

    torch's own message advises to allow code, which fastldm does not.
    """
    code = _REFUSED_CODE.search(str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(_TORCH_ADVICE)]
    reason = reasons[0] if reasons else type(error).__name__
    holds = code[1] if code else f"more than tensors, or is damaged ({reason})"
    return (
        f"refused: it holds {holds}, and fastldm never runs code from a weights file; "
        "convert it to safetensors where you trust it"
    )


def _load_pickle(path: Path, device: str | torch.device) -> dict[str, torch.Tensor]:
    try:
        value = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many types on a damaged file
        raise CheckpointError(f"{path}: {pickle_problem(error)}") from None
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a dict of named tensors")
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
