"""Files that are damaged, cut off, of another kind or malicious: one error, and no code run."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastldm import LatentDiffusion
from fastldm.checkpoints import read_tensors
from fastldm.errors import CheckpointError
from fastldm.models import VQModel

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2, dtype=torch.int32)}
RAN: list[str] = []


def record(what: str) -> None:
    RAN.append(what)


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return record, ("ran",)


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def torch_file(tmp_path: Path, value: Any, **options: Any) -> bytes:
    path = tmp_path / "made.pt"
    torch.save(value, path, **options)
    return path.read_bytes()


def repacked(content: bytes, tmp_path: Path, method: int, extra: bytes = b"") -> bytes:
    """The same archive with its entries compressed."""
    source, target = tmp_path / "in.zip", tmp_path / "out.zip"
    source.write_bytes(content)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item) + extra)
    return target.read_bytes()


def whole_pickle(tmp_path: Path) -> bytes:
    return torch_file(tmp_path, {"state_dict": TENSORS, "epoch": 3})


BAD: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty": ("ckpt", lambda _: b"", "refused"),
    "empty safetensors": ("safetensors", lambda _: b"", "damaged"),
    "text": ("ckpt", lambda _: b"<html>404</html>", "refused"),
    "text as safetensors": ("safetensors", lambda _: b"<html>404</html>" * 9, "damaged"),
    "cut archive": ("ckpt", lambda p: whole_pickle(p)[:-40], "damaged or cut off"),
    "half an archive": ("ckpt", lambda p: whole_pickle(p)[:300], "damaged or cut off"),
    "cut safetensors": (
        "safetensors",
        lambda _: safetensors_file({"a": entry([2], 0, 8)}, b"1234"),
        "damaged",
    ),
    "header longer than the file": ("safetensors", lambda _: struct.pack("<Q", 2**40), "damaged"),
    "header of no JSON": ("safetensors", lambda _: safetensors_file(b"{]" * 8), "damaged"),
    "header of deep JSON": ("safetensors", lambda _: safetensors_file(b"[" * 10**5), "damaged"),
    "shape that overflows": (
        "safetensors",
        lambda _: safetensors_file({"a": entry([2**33, 2**33], 0, 8)}, b"12345678"),
        "damaged",
    ),
    "overlapping tensors": (
        "safetensors",
        lambda _: safetensors_file({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"12345678"),
        "damaged",
    ),
    "unknown dtype": (
        "safetensors",
        lambda _: safetensors_file({"a": entry([8], 0, 8, "Q4")}, b"12345678"),
        "damaged",
    ),
    "no tensors": ("safetensors", lambda _: safetensors_file({}), "holds no tensors"),
    "a list": ("ckpt", lambda p: torch_file(p, [1, 2]), "holds list, not a dict"),
    "numbered tensors": ("ckpt", lambda p: torch_file(p, {1: torch.ones(1)}), "holds dict, not"),
    "no tensors in a pickle": ("ckpt", lambda p: torch_file(p, {"a": 1}), "holds no tensors"),
    "code": (
        "ckpt",
        lambda p: torch_file(p, {"state_dict": {"a": Hostile()}}),
        "refused: it holds",
    ),
    "code in an old pickle": (
        "pt",
        lambda p: torch_file(p, {"a": Hostile()}, _use_new_zipfile_serialization=False),
        "refused: it holds",
    ),
    "a bare pickle of code": ("pth", lambda _: pickle.dumps(Hostile()), "refused"),
    "code under a safetensors name": (
        "safetensors",
        lambda p: torch_file(p, {"a": Hostile()}),
        "damaged",
    ),
    "builtins": ("ckpt", lambda _: b"cbuiltins\neval\n(S'1+1'\ntR.", "refused"),
    "os.system": ("ckpt", lambda _: b"cos\nsystem\n(S'true'\ntR.", "refused"),
    "compressed archive": (
        "ckpt",
        lambda p: repacked(whole_pickle(p), p, zipfile.ZIP_DEFLATED),
        "compressed, as torch never writes them",
    ),
    "compressed archive of much more": (
        "ckpt",
        lambda p: repacked(whole_pickle(p), p, zipfile.ZIP_DEFLATED, bytes(10**6)),
        "compressed, as torch never writes them",
    ),
    "a tensor that repeats its bytes": (
        "ckpt",
        lambda p: torch_file(p, {"a": torch.ones(1).expand(2**20, 2**10)}),
        "claims more bytes than the file has",
    ),
    "many tensors of the same bytes": (
        "ckpt",
        lambda p: torch_file(p, {str(n): SHARED for n in range(30)}),
        "claims more bytes than the file has",
    ),
    "a sparse tensor": (
        "ckpt",
        lambda p: torch_file(p, {"a": torch.eye(3).to_sparse()}),
        "sparse|refused",
    ),
}
SHARED = torch.ones(10_000)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_clear_error_and_run_no_code(name: str, tmp_path: Path) -> None:
    extension, make, message = BAD[name]
    path = tmp_path / f"model.{extension}"
    path.write_bytes(make(tmp_path))
    for read in (read_tensors, VQModel.from_single_file, LatentDiffusion.from_single_file):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert not RAN


def test_a_pickle_that_is_hostile_would_have_run() -> None:
    pickle.loads(pickle.dumps(Hostile()))
    assert RAN == ["ran"]
    RAN.clear()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="not a file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_every_age(wrapped: bool, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    content = {"state_dict": TENSORS, "global_step": 4} if wrapped else TENSORS
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    tensors = read_tensors(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_safetensors_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    save_file(TENSORS, path)
    assert torch.equal(read_tensors(path)["a.weight"], TENSORS["a.weight"])


def test_what_lightning_leaves_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    # The callbacks of Lightning 1 are keyed by their class, and numpy scalars are among them.
    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    path, made = tmp_path / "model.ckpt", tmp_path / "made.ckpt"
    torch.save({"state_dict": TENSORS, "callbacks": {"KEY": {"best": 1}}}, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl"):
                key = b"X\x03\x00\x00\x00KEY"
                assert key in content
                replacement = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
                content = content.replace(key, replacement)
            new.writestr(item.filename, content)
    allowed = set(torch.serialization.get_safe_globals())
    assert torch.equal(read_tensors(path)["a.weight"], TENSORS["a.weight"])
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_a_large_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    for extension, save in (("ckpt", torch.save), ("safetensors", save_file)):
        path = tmp_path / f"large.{extension}"
        save({"a": torch.zeros(2**16)}, path)
        tensor = read_tensors(path)["a"]
        ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        mapped = [
            tuple(int(end, 16) for end in fields[0].split("-"))
            for fields in ranges
            if fields[-1] == str(path)
        ]
        assert any(start <= tensor.data_ptr() < end for start, end in mapped)


def test_names_and_tensors_that_are_given_are_checked() -> None:
    with pytest.raises(CheckpointError, match="the given tensors: 'a' is a int, not a tensor"):
        read_tensors({"a": 1})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="the given tensors: holds no tensors"):
        read_tensors({})
    with pytest.raises(CheckpointError, match="a is sparse"):
        read_tensors({"a": torch.eye(2).to_sparse()})
