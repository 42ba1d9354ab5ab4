"""Latents of a data set, encoded once and kept on disk.

A cache is a folder of safetensors shards with the posterior of each image (``mean`` and, for a KL
first stage, ``logvar``; for VQ the latent before quantisation as ``mean``), ``items.jsonl`` with
names, captions and classes, and ``index.json`` with hashes of the first stage and of the data, so
that latents of another autoencoder are never trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastldm.data import DataConfig, ImageDataset, build_dataloader, load_images
from fastldm.data.loader import EpochBatchSampler, EpochSampler
from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.storage import atomic_directory, load_weights, read_json, save_weights, write_json

FORMAT = 1
_INDEX = "index.json"
_ITEMS = "items.jsonl"
_FLIPPED = "_flipped"
_WITHOUT_EFFECT = (
    "seed", "num_workers", "cache_megabytes", "shuffle_buffer", "horizontal_flip",
    "vertical_flip", "strict", "require_captions", "require_classes",
)  # fmt: skip
"""Fields of a data config that change no latent."""


def hash_first_stage(model: Any) -> str:
    """SHA-256 of a first stage's encoder-side identity: class, config and all weights.

    The scale of the latents is left out: training the second stage sets it.
    """
    digest = hashlib.sha256()
    config = {
        name: value
        for name, value in model.config.items()
        if name not in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    }
    digest.update(json.dumps([type(model).__name__, config], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_data(config: DataConfig, names: list[str] | None, split: str) -> str:
    """SHA-256 of what decides which images are encoded: the config, the split and their names."""
    fields = _deciding_fields(dataclasses.asdict(config))
    return hashlib.sha256(json.dumps([fields, names, split], sort_keys=True).encode()).hexdigest()


def _deciding_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a data config that change a latent, a caption or a class."""
    return {name: value for name, value in config.items() if name not in _WITHOUT_EFFECT}


def encode_dataset(
    first_stage: nn.Module,
    data: DataConfig,
    output_dir: str | Path,
    *,
    split: Literal["train", "test"] = "train",
    batch_size: int = 16,
    flips: bool = False,
    shard_size: int = 4096,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """Encode all images of a data set, without augmentation.

    Args:
        first_stage: the trained autoencoder.
        data: the images.
        output_dir: the cache, which replaces an earlier one there once it is whole.
        split: which images.
        batch_size: images encoded at once.
        flips: encode every image mirrored, too.
        shard_size: images a file, rounded up to whole batches.
        device: where to encode.
        progress: show a progress bar.

    Returns:
        `output_dir`.

    Raises:
        DataError: the images cannot be used, or give latents that are not finite.
        ConfigError: `output_dir` is a folder with something other than a cache in it.
        OSError: the disk is full; an earlier cache is kept.
    """
    from tqdm.auto import tqdm

    output_dir = Path(output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / _INDEX).is_file():
        raise ConfigError(f"{output_dir}: holds other files than a latent cache; choose another")
    dataset = load_images(data, split=split, augment=False)
    names = dataset.names if isinstance(dataset, ImageDataset) else None
    loader = build_dataloader(data, dataset, batch_size, shuffle=False, drop_last=False)
    first_stage = first_stage.to(device).eval()
    with atomic_directory(output_dir) as folder:
        writer = _ShardWriter(folder, shard_size)
        total = len(dataset) if isinstance(dataset, ImageDataset) else None
        with tqdm(total=total, desc="encode", unit="image", disable=not progress) as bar:
            for batch in loader:
                images = batch["pixel_values"].to(device)
                tensors = _posterior(first_stage, images)
                if flips:
                    mirrored = _posterior(first_stage, images.flip(-1))
                    tensors |= {name + _FLIPPED: value for name, value in mirrored.items()}
                writer.add(tensors, batch)
                bar.update(len(images))
        shape = writer.finish()
        index = {
            "format": FORMAT,
            "first_stage": {
                "class_name": type(first_stage).__name__,
                "hash": hash_first_stage(first_stage),
            },
            "data": {
                "hash": hash_data(data, names, split),
                "config": dataclasses.asdict(data),
                "split": split,
            },
            "class_names": dataset.class_names,
            "latent_shape": shape,
            "flips": flips,
            "shards": writer.shards,
        }
        write_json(folder / _INDEX, index)
    return output_dir


def _posterior(first_stage: Any, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        output = first_stage.encode(images)
    if hasattr(output, "latents"):
        tensors = {"mean": output.latents}
    elif first_stage.has_posterior:
        tensors = {"mean": output.latent_dist.mean, "logvar": output.latent_dist.logvar}
    else:
        tensors = {"mean": output.latent_dist.mean}
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise DataError("the first stage gives latents that are not finite")
    return {name: value.float().cpu() for name, value in tensors.items()}


class _ShardWriter:
    def __init__(self, folder: Path, shard_size: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self._folder = folder
        self._shard_size = shard_size
        self._waiting: list[dict[str, Tensor]] = []
        self._count = 0
        self._shape: list[int] | None = None

    def add(self, tensors: dict[str, Tensor], batch: dict[str, Any]) -> None:
        mean = tensors["mean"]
        shape = list(mean.shape[1:])
        if self._shape not in (None, shape):
            raise DataError(f"latents of {shape} after latents of {self._shape}")
        self._shape = shape
        self._waiting.append(tensors)
        self._count += len(mean)
        labels = batch["class_label"].tolist() if "class_label" in batch else [None] * len(mean)
        captions = batch.get("caption", [None] * len(mean))
        with (self._folder / _ITEMS).open("a", encoding="utf-8") as items:
            for name, caption, label in zip(batch["name"], captions, labels, strict=True):
                entry = {"name": name, "caption": caption, "class_label": label}
                items.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self._count >= self._shard_size:
            self._flush()

    def finish(self) -> list[int]:
        if self._count:
            self._flush()
        if self._shape is None:
            raise DataError("there is no image to encode")
        return self._shape

    def _flush(self) -> None:
        file = f"latents-{len(self.shards):05}.safetensors"
        names = self._waiting[0]
        tensors = {name: torch.cat([part[name] for part in self._waiting]) for name in names}
        save_weights(tensors, self._folder / file)
        self.shards.append({"file": file, "count": self._count})
        self._waiting, self._count = [], 0


class LatentCache:
    """The latents of a cache, read from disk as they are needed.

    Args:
        folder: from `encode_dataset`.
        first_stage_hash: `hash_first_stage` of the autoencoder that is in use.
        data_hash: `hash_data` of the data that is in use; None does not compare.
        data: the data that is in use, to say in what they differ.

    Attributes:
        captions, class_labels: of each item, or None where there are none.
        class_names: names of the classes by their number, or None.
        latent_shape: [C, h, w].
        epoch: for the order of a loader.

    Raises:
        DataError: the cache was made by another first stage or of other data.
        CheckpointError: a file of it is missing or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        first_stage_hash: str,
        data_hash: str | None = None,
        data: DataConfig | None = None,
    ) -> None:
        self.folder = Path(folder)
        if self.folder.is_dir() and not (self.folder / _INDEX).is_file():
            raise CheckpointError(f"{self.folder}: no latent cache: there is no {_INDEX} in it")
        index = read_json(self.folder / _INDEX)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CheckpointError(f"{self.folder / _INDEX}: not an index of format {FORMAT}")
        for what, current in (("first_stage", first_stage_hash), ("data", data_hash)):
            stored = index[what]["hash"]
            if current is not None and stored != current:
                reason = ""
                if what == "data" and data is not None:
                    reason = f" ({_difference(index['data']['config'], data)})"
                raise DataError(
                    f"{self.folder}: stale latent cache: its {what} has hash {stored[:16]}, the "
                    f"one in use has {current[:16]}{reason}; delete the cache or encode again"
                )
        self.class_names: list[str] | None = index["class_names"]
        self.latent_shape: list[int] = index["latent_shape"]
        self.epoch = 0
        self._variants = ["", _FLIPPED] if index["flips"] else [""]
        self._shards: list[dict[str, Tensor]] = []
        self._rows: list[tuple[int, int]] = []
        for number, shard in enumerate(index["shards"]):
            tensors = load_weights(self.folder / shard["file"])
            self._shards.append(tensors)
            self._rows += [(number, row) for row in range(shard["count"])]
        lines = (self.folder / _ITEMS).read_text(encoding="utf-8").splitlines()
        self._items: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if len(self._items) != len(self._rows):
            raise CheckpointError(
                f"{self.folder}: {len(self._items)} items but {len(self._rows)} latents"
            )
        self.captions: list[str] | None = self._column("caption")
        self.class_labels: list[int] | None = self._column("class_label")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_flips(self) -> bool:
        """Whether it holds every image mirrored, too."""
        return len(self._variants) > 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the order."""
        self.epoch = epoch

    def batch(self, indices: list[int]) -> dict[str, Any]:
        """Items as one batch.

        Returns:
            ``mean`` and for a KL first stage ``logvar``, [B, V, C, h, w] with V = 2 where mirrored
            images were encoded, too, else 1; ``index``; ``name``, and ``caption`` (lists) and
            ``class_label`` (int64 [B]) where there are any.
        """
        batch: dict[str, Any] = {"index": torch.tensor(indices), "name": []}
        for name in ("mean", "logvar"):
            if name in self._shards[0]:
                rows = [self._variants_of(name, *self._rows[index]) for index in indices]
                batch[name] = torch.stack(rows)
        items = [self._items[index] for index in indices]
        batch["name"] = [item["name"] for item in items]
        if self.captions is not None:
            batch["caption"] = [item["caption"] for item in items]
        if self.class_labels is not None:
            batch["class_label"] = torch.tensor([item["class_label"] for item in items])
        return batch

    def _variants_of(self, name: str, shard: int, row: int) -> Tensor:
        return torch.stack([self._shards[shard][name + variant][row] for variant in self._variants])

    def _column(self, name: str) -> list[Any] | None:
        has_values = bool(self._items) and self._items[0][name] is not None
        return [item[name] for item in self._items] if has_values else None


def _difference(stored: Mapping[str, Any], data: DataConfig) -> str:
    """The fields of two data configs that differ; where none do, the images themselves did."""
    now = json.loads(json.dumps(_deciding_fields(dataclasses.asdict(data))))
    changed = [
        f"{name} was {stored.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if stored.get(name) != value
    ]
    return "; ".join(changed) or "the names of the images or the split differ"


class LatentLoader:
    """Batches of a cache, in the order that images of the same seed and epoch would have.

    Args:
        cache: the latents.
        batch_size: latents a batch and process.
        seed: of the order.
        num_processes, process_index: as for `build_dataloader`.

    Raises:
        DataError: the cache has fewer latents than one step takes.
    """

    def __init__(
        self,
        cache: LatentCache,
        batch_size: int,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        if len(cache) < batch_size * num_processes:
            raise DataError(
                f"the latent cache has {len(cache)} images, fewer than one step takes: "
                f"batch_size={batch_size} × processes={num_processes}"
            )
        order: Any = cache
        self._cache = cache
        self._batches = EpochBatchSampler(
            EpochSampler(order, seed, shuffle=True),
            batch_size,
            drop_last=True,
            num_processes=num_processes,
            process_index=process_index,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch of the next iteration and how many of its batches to pass over."""
        self._cache.set_epoch(epoch)
        self._batches.start_batch = start_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._cache.batch(indices) for indices in self._batches)
