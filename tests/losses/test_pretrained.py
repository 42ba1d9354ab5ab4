"""Downloads of published weights: cache, hash check and refusal."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.losses.pretrained import cached_download


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def served(tmp_path: Path, content: bytes, digest: str) -> str:
    source = tmp_path / f"weights-{digest}.pth"
    source.write_bytes(content)
    return source.as_uri()


def test_a_file_is_fetched_once(hub: Path, tmp_path: Path) -> None:
    content = b"weights"
    url = served(tmp_path, content, hashlib.sha256(content).hexdigest()[:8])
    path = cached_download(url, purpose="A test", remedy="none")
    assert path.parent == hub
    assert path.read_bytes() == content
    path.write_bytes(b"kept")
    assert cached_download(url, purpose="A test", remedy="none").read_bytes() == b"kept"
    assert socket.getdefaulttimeout() is None


def test_a_wrong_hash_is_refused(hub: Path, tmp_path: Path) -> None:
    url = served(tmp_path, b"tampered", "0123abcd")
    with pytest.raises(ConfigError, match=r"A test needs weights-0123abcd\.pth.*hash.*do this"):
        cached_download(url, purpose="A test", remedy="do this")
    assert not list(hub.iterdir())


def test_an_unreachable_file_is_named(hub: Path, tmp_path: Path) -> None:
    url = (tmp_path / "nothing-0123abcd.pth").as_uri()
    with pytest.raises(ConfigError, match=r"could not be downloaded from file:.*do this"):
        cached_download(url, purpose="A test", remedy="do this")
