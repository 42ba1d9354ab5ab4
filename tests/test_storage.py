"""Files are whole or not there; weights never run code."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from fastldm.errors import CheckpointError
from fastldm.storage import (
    atomic_directory,
    atomic_file,
    load_weights,
    read_json,
    recover_directory,
    save_weights,
    write_json,
)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_directory_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_directory(target) as folder:
            assert folder != target
            (folder / "a.txt").write_text(content)
        assert _tree(target) == {"a.txt": content.encode()}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_failure_keeps_the_old_directory(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "a.txt").write_text("good")
    with pytest.raises(type(error)), atomic_directory(target) as folder:
        (folder / "a.txt").write_text("half")
        raise error
    assert _tree(target) == {"a.txt": b"good"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_failure_between_the_two_renames_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "a.txt").write_text("good")
    rename = Path.rename

    def failing_rename(self: Path, to: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(errno.EIO, "injected")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OSError, match="injected"), atomic_directory(target) as folder:
        (folder / "a.txt").write_text("new")
    assert _tree(target) == {"a.txt": b"good"}


def test_recovery_after_a_crash(tmp_path: Path) -> None:
    target = tmp_path / "model"
    retired = tmp_path / ".old-model"
    retired.mkdir()
    (retired / "a.txt").write_text("good")
    (tmp_path / ".tmp-model-abc").mkdir()
    recover_directory(target)
    assert _tree(target) == {"a.txt": b"good"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    retired.mkdir()
    recover_directory(target)
    assert _tree(target) == {"a.txt": b"good"}
    assert not retired.exists()


def test_killed_writer_never_leaves_a_partial_directory(tmp_path: Path) -> None:
    """Kill -9 at random moments while one folder is rewritten over and over."""
    target = tmp_path / "model"
    writer = textwrap.dedent(
        f"""
        import itertools
        from fastldm.storage import atomic_directory
        for n in itertools.count():
            with atomic_directory({str(target)!r}) as folder:
                for part in range(4):
                    (folder / f"part{{part}}").write_text(f"{{n}}" * 20_000)
            if n == 0:
                print("ready", flush=True)
        """
    )
    for delay in (0.0, 0.013, 0.029, 0.05):
        process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        recover_directory(target)
        tree = _tree(target)
        assert sorted(tree) == ["part0", "part1", "part2", "part3"]
        assert len(set(tree.values())) == 1
        assert len(tree["part0"]) >= 20_000
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), ("{", "not a JSON file")])
def test_unreadable_json_is_named(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {reason}"):
        read_json(path)


def test_weights_round_trip_bit_for_bit_also_when_they_share_memory(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "a": base,
        "b": base.t(),
        "tied": base,
        "half": base.to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
    }
    save_weights(tensors, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("keep", [0, 4, 20, 200])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_weights(path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        load_weights(tmp_path / "gone.safetensors")


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    marker = tmp_path / "was_run"
    path = tmp_path / "w.ckpt"
    payload = {"state_dict": {"a": torch.ones(1)}, "extra": _Malicious(marker)}
    if writer == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps({"extra": _Malicious(marker)}))
    with pytest.raises(CheckpointError, match=r"refused: it holds .*never runs code") as caught:
        load_weights(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    if writer == "torch":
        assert "posix.mkdir" in str(caught.value)


def test_plain_pickle_of_tensors_is_read_and_unwrapped(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(3)}, "global_step": 5}, tmp_path / "w.ckpt")
    assert torch.equal(load_weights(tmp_path / "w.ckpt")["a"], torch.arange(3))
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds list"):
        load_weights(tmp_path / "list.pt")


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
