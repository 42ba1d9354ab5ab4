"""Finding, reading, checking and writing the weight files of a model folder.

A folder holds ``<name>.safetensors``, or shards of it listed in ``<name>.safetensors.index.json``;
a variant such as fp16 puts its name before the extension. A pickled ``<name>.bin`` is read only
where no safetensors file is there, and never runs code.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastldm.errors import CheckpointError, ConfigError
from fastldm.storage import atomic_file, load_weights, read_json, save_weights, write_json

logger = logging.getLogger(__name__)

Locator = Callable[[str], Path | None]
"""Maps a file name inside the model folder to a local path, or None where there is no such file."""

_SHOWN_KEYS = 5
_SIZE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"10GB"`` or ``"500MB"``; an int is taken as bytes."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", size.upper())
    if match is None or match[2] not in _SIZE_UNITS:
        raise ConfigError(f"max_shard_size: expected bytes or a size such as '10GB', got {size!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def folder_locator(folder: Path) -> Locator:
    """Files of a folder on this machine."""

    def locate(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return locate


def hub_locator(repository: str, subfolder: str | None, **options: Any) -> Locator:
    """Files of a Hugging Face Hub repository, downloaded to its cache when asked for."""
    anything_found = False

    def locate(name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        nonlocal anything_found
        try:
            path = Path(hf_hub_download(repository, name, subfolder=subfolder, **options))
        except LocalEntryNotFoundError as error:
            # Without a network this stands for an absent file only if others are in the cache.
            if anything_found:
                return None
            raise _unreachable(repository, error) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            raise _unreachable(repository, error) from None
        anything_found = True
        return path

    return locate


def _unreachable(repository: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"{repository!r} is neither a folder here nor a model that the Hugging Face Hub gives "
        f"({type(error).__name__}: {reason})"
    )


def make_locator(source: str | Path, subfolder: str | None, **hub_options: Any) -> Locator:
    """Files of `source`: a folder where it exists here, else a Hub repository of that name.

    Raises:
        CheckpointError: no such folder, and the name cannot be that of a Hub repository.
    """
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        return folder_locator(folder)
    if Path(source).exists() or not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{folder}: no such folder")
    logger.info("%s: no such folder here; looking for it on the Hugging Face Hub", source)
    return hub_locator(str(source), subfolder, **hub_options)


def why_no_model(folder: str | Path, wanted: str) -> str:
    """What to tell a user who named a folder without the file `wanted`.

    A run's folder holds its model in ``final``, which is easily left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}"
    inside = folder / "final"
    hint = f"; its model is in {inside}" if (inside / wanted).is_file() else ""
    return f"{folder}: there is no {wanted} in it{hint}"


def with_variant(file_name: str, variant: str | None) -> str:
    """`file_name` of a variant: ``model.safetensors`` → ``model.fp16.safetensors``."""
    if variant is None:
        return file_name
    stem, extension = file_name.rsplit(".", 1)
    return f"{stem}.{variant}.{extension}"


def index_names(weights_name: str, variant: str | None) -> list[str]:
    """Names that the index of shards goes by; the first is the one written."""
    if variant is None:
        return [f"{weights_name}.index.json"]
    return [f"{weights_name}.{variant}.index.json", f"{weights_name}.index.{variant}.json"]


def read_state_dict(
    locate: Locator,
    weights_name: str,
    variant: str | None,
    source: str,
    *,
    pickles: bool = True,
) -> dict[str, torch.Tensor]:
    """Tensors of the weights in a model folder.

    Args:
        pickles: read a ``.bin``, without running code, where there is no safetensors file.

    Raises:
        CheckpointError: there are no weights, or a file of them is missing, damaged or unsafe.
    """
    stem = weights_name.rsplit(".", 1)[0]
    looked_for = []
    for name in (weights_name, f"{stem}.bin") if pickles else (weights_name,):
        single = with_variant(name, variant)
        looked_for.append(single)
        path = locate(single)
        if path is not None:
            return load_weights(path)
        for index_name in index_names(name, variant):
            path = locate(index_name)
            if path is not None:
                return _read_shards(locate, path)
    raise CheckpointError(
        f"{source}: no weights: none of {', '.join(looked_for)} or an index of shards"
    )


def _read_shards(locate: Locator, index_path: Path) -> dict[str, torch.Tensor]:
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise CheckpointError(f"{index_path}: its weight_map does not map tensors to file names")
    state_dict: dict[str, torch.Tensor] = {}
    for shard_name in sorted(set(weight_map.values())):
        path = locate(shard_name)
        if path is None:
            raise CheckpointError(f"{index_path} lists the shard {shard_name}, which is missing")
        state_dict.update(load_weights(path))
    return state_dict


_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_attention_keys(
    state_dict: Mapping[str, torch.Tensor], expected: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Give attention weights written by diffusers before 0.15 their present names."""
    expected = set(expected)
    renamed = {}
    for key, tensor in state_dict.items():
        head, _, leaf = key.rpartition(".")
        prefix, _, name = head.rpartition(".")
        current = f"{prefix}.{_OLD_ATTENTION_NAMES.get(name, name)}.{leaf}"
        renamed[current if key not in expected and current in expected else key] = tensor
    return renamed


def check_state_dict(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: str
) -> None:
    """Require the same names and shapes on both sides.

    Raises:
        CheckpointError: with the first missing and unexpected names, or the first wrong shapes.
    """
    problems = []
    for label, names in (
        ("missing", [name for name in expected if name not in state_dict]),
        ("unexpected", [name for name in state_dict if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            problems.append(f"{label} {', '.join(names[:_SHOWN_KEYS])}{more}")
    wrong = [
        f"{name} is {list(state_dict[name].shape)} in the file, {list(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if wrong:
        problems.append("; ".join(wrong[:_SHOWN_KEYS]))
    if problems:
        raise CheckpointError(
            f"{source}: the weights belong to another architecture: {'; '.join(problems)}"
        )


def write_model_folder(
    folder: Path,
    config_name: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    weights_name: str,
    variant: str | None,
    max_shard_bytes: int,
) -> None:
    """Write config and weights into `folder`; other files in it stay as they are.

    Every file is first written whole under a temporary name, then all are renamed, so that a full
    disk or an interruption leaves what was there.
    """
    shards = _split(state_dict, max_shard_bytes)
    single_name = with_variant(weights_name, variant)
    index_name = index_names(weights_name, variant)[0]
    stem, extension = single_name.rsplit(".", 1)
    names = [
        f"{stem}-{number:05d}-of-{len(shards):05d}.{extension}"
        for number in range(1, len(shards) + 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as renames:
        # Renamed in reverse order of entry: weights before the files that describe them.
        write_json(renames.enter_context(atomic_file(folder / config_name)), config)
        if len(shards) == 1:
            names = [single_name]
        else:
            weight_map = {
                key: name for name, shard in zip(names, shards, strict=True) for key in shard
            }
            total = sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(renames.enter_context(atomic_file(folder / index_name)), index)
        for name, shard in zip(names, shards, strict=True):
            save_weights(shard, renames.enter_context(atomic_file(folder / name)))
        if len(shards) > 1:
            # An old index over partly renamed new shards would mix two models.
            for old_index in index_names(weights_name, variant):
                (folder / old_index).unlink(missing_ok=True)
    _remove_stale(folder, stem, extension, {*names}, index_names(weights_name, variant))


def _split(
    state_dict: Mapping[str, torch.Tensor], max_shard_bytes: int
) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state_dict.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += bytes_
    return shards


def _remove_stale(
    folder: Path, stem: str, extension: str, written: set[str], index_files: list[str]
) -> None:
    """Delete what an earlier save of the same weights left: the other of shards and single file."""
    shard = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.{re.escape(extension)}")
    sharded = len(written) > 1
    for path in folder.iterdir():
        old_shard = shard.fullmatch(path.name) and path.name not in written
        old_single = sharded and path.name == f"{stem}.{extension}"
        old_index = not sharded and path.name in index_files
        if old_shard or old_single or old_index:
            path.unlink()
