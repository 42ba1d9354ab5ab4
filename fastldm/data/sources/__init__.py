"""Finding out what a source is, and reading it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from fastldm.data.config import DataConfig, is_webdataset
from fastldm.data.sources.table import ImageTable
from fastldm.errors import DataError

__all__ = ["ImageTable", "read_source"]

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_source(config: DataConfig, split: str) -> ImageTable:
    """Open the source of a config; nothing is decoded.

    Raises:
        DataError: it is missing, empty or of an unknown kind.
    """
    from fastldm.data.sources import emoji, folder, huggingface, idx

    source = config.source
    if source == "emoji":
        return emoji.read_emoji(config)
    if source.startswith("idx:"):
        return idx.read_idx(Path(source.removeprefix("idx:")).expanduser(), config, split)
    if source.startswith("hub:"):
        return huggingface.read_hub(source.removeprefix("hub:"), config, split)
    if source.startswith("parquet:") or source.endswith(".parquet"):
        return huggingface.read_parquet(source.removeprefix("parquet:"), config)
    if is_webdataset(source):
        return huggingface.read_webdataset(source.removeprefix("webdataset:"), config)
    path = Path(source).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return huggingface.read_saved(path, config, split)
        return folder.read_folder(path, config, split)
    if path.exists():
        raise DataError(
            f"{source}: a file; the source must be a folder of images, a .parquet or a .tar"
        )
    if _HUB_NAME.fullmatch(source):
        logger.info("%s: no such folder here; looking for it on the Hugging Face hub", source)
        try:
            return huggingface.read_hub(source, config, split)
        except DataError as error:
            raise DataError(
                f"{source}: no such folder; as a data set of the hub: {error}"
            ) from error
    raise DataError(f"{source}: no such folder (a data set of the hub is written hub:{source})")
