"""Published weights that a loss or metric downloads once and keeps in torch.hub's cache."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import torch

from fastldm.errors import ConfigError

_CONNECT_SECONDS = 20.0


def cached_download(url: str, *, purpose: str, remedy: str) -> Path:
    """Path of the file at `url` in torch.hub's cache, downloaded there if it is missing.

    A hash in the file name, as torchvision writes it (``vgg16-397923af.pth``), is checked.

    Args:
        purpose: what needs the file, for the error.
        remedy: what a person without a network can do, for the error.

    Raises:
        ConfigError: the file is not in the cache and cannot be downloaded.
    """
    path = _cached_path(url)
    name = path.name
    if path.is_file():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _connection_timeout(_CONNECT_SECONDS):
            torch.hub.download_url_to_file(
                url, str(path), hash_prefix=digest[1] if digest else None, progress=False
            )
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{purpose} needs {name}, which is not at {path} and could not be downloaded from "
            f"{url} ({error}); {remedy}"
        ) from None
    return path


def is_cached(url: str) -> bool:
    """Whether the file at `url` is in torch.hub's cache."""
    return _cached_path(url).is_file()


def _cached_path(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


@contextmanager
def _connection_timeout(seconds: float) -> Iterator[None]:
    """torch.hub sets none, so that an unanswered connection would stop training for minutes."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
