"""Where the second stage's latents come from: a cache on disk, or the images of each step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.data import DataConfig, ImageDataset, build_dataloader, load_images
from fastldm.errors import ConfigError, DataError
from fastldm.latent_diffusion import LatentDiffusion
from fastldm.training.batches import BatchStream
from fastldm.training.config import LatentDiffusionTrainingConfig
from fastldm.training.environment import Environment
from fastldm.training.latent_cache import (
    LatentCache,
    LatentLoader,
    encode_dataset,
    hash_data,
    hash_first_stage,
)
from fastldm.training.noise import Stream, generators, normal, uniform

logger = logging.getLogger(__name__)


class LatentSource:
    """Batches of latents or images, with what is known of captions and classes.

    Args:
        config: names the cache, the images or both.
        first_stage: the trained autoencoder.
        environment: of the run.

    Attributes:
        batches: the endless stream.
        latent_shape: [C, h, w].
        captions: of all items, or None where they are unknown.
        class_names: or None.

    Raises:
        DataError: the cache is stale, or the data cannot be used.
        ConfigError: the resolution is no multiple of f; or a cache is missing and cannot be made.
    """

    def __init__(
        self, config: LatentDiffusionTrainingConfig, first_stage: Any, environment: Environment
    ) -> None:
        self._seed = config.seed
        self._device = environment.device
        processes: dict[str, Any] = {
            "num_processes": environment.num_processes,
            "process_index": environment.process_index,
        }
        if config.data is not None:
            check_resolution(config.data, first_stage)
        if config.latent_cache is not None:
            cache = _open_cache(config, first_stage, environment)
            order_seed = 0 if config.data is None else config.data.seed
            loader: Any = LatentLoader(cache, config.batch_size, order_seed, **processes)
            self.latent_shape = cache.latent_shape
            self.captions = cache.captions
            self.class_names = cache.class_names
            self.has_labels = cache.class_labels is not None
        else:
            assert config.data is not None
            dataset = load_images(config.data)
            loader = build_dataloader(
                config.data,
                dataset,
                config.batch_size,
                pin_memory=environment.device.type == "cuda",
                **processes,
            )
            side = config.data.resolution // first_stage.downsampling_factor
            self.latent_shape = [first_stage.latent_channels, side, side]
            self.captions = dataset.captions
            self.class_names = dataset.class_names
            self.has_labels = dataset.class_names is not None
        self.batches = BatchStream(loader)
        self._loader = loader
        self._images_per_batch = config.batch_size * environment.num_processes

    def batches_within(self, items: int) -> int:
        """How many batches hold at most so many items and at most one epoch; 0 for a stream."""
        try:
            epoch = len(self._loader)
        except TypeError:
            return 0
        return min(epoch, items // self._images_per_batch)

    def raw_latents(
        self, diffusion: LatentDiffusion, batch: dict[str, Any], step: int, positions: range
    ) -> Tensor:
        """Samples of the first stage's posterior, [B, C, h, w], not scaled.

        Args:
            diffusion: holds the first stage.
            batch: from `batches`.
            step: its number.
            positions: places of the samples in the global batch.
        """
        sources = generators(self._seed, Stream.POSTERIOR, step, positions)
        if "pixel_values" in batch:
            images = batch["pixel_values"].to(self._device, non_blocking=True)
            with torch.no_grad():
                return diffusion.encode_raw(images, sources)
        variants = batch["mean"].shape[1]
        rows = torch.arange(len(batch["mean"]))
        chosen = torch.zeros_like(rows)
        if variants > 1:
            flips = uniform(generators(self._seed, Stream.FLIP, step, positions))
            chosen = (flips * variants).long()
        latents: Tensor = batch["mean"][rows, chosen]
        if "logvar" in batch:
            std = torch.exp(0.5 * batch["logvar"][rows, chosen])
            latents = latents + std * normal(sources, latents.shape[1:])
        return latents.to(self._device)


def check_resolution(data: DataConfig, first_stage: Any) -> None:
    """Require images that the first stage can take.

    Raises:
        ConfigError: the resolution is no multiple of f, or the channels differ.
    """
    f, resolution = first_stage.downsampling_factor, data.resolution
    if resolution % f:
        above = -(-resolution // f) * f
        raise ConfigError(
            f"data.resolution: {resolution} is not a multiple of f = {f}, the downsampling factor "
            f"of the autoencoder; nearest: {max(f, above - f)} or {above}"
        )
    channels = first_stage.config.get("in_channels", first_stage.latent_channels)
    if channels != data.channels:
        raise ConfigError(f"data.channels: {data.channels}, but the autoencoder takes {channels}")


def _open_cache(
    config: LatentDiffusionTrainingConfig, first_stage: Any, environment: Environment
) -> LatentCache:
    folder = Path(str(config.latent_cache))
    if not folder.exists():
        if config.data is None:
            raise DataError(f"latent_cache: {folder} does not exist and no data is given")
        if environment.num_processes > 1:
            raise ConfigError(
                f"latent_cache: {folder} does not exist; make it with `fastldm encode` before "
                "training with several processes"
            )
        encode_dataset(
            first_stage,
            config.data,
            folder,
            batch_size=config.batch_size,
            flips=config.cache_flips,
            device=environment.device,
            progress=config.progress_bar,
        )
    data_hash = None
    if config.data is not None:
        dataset = load_images(config.data, augment=False)
        names = dataset.names if isinstance(dataset, ImageDataset) else None
        data_hash = hash_data(config.data, names, "train")
    cache = LatentCache(folder, hash_first_stage(first_stage), data_hash, config.data)
    if environment.is_main:
        _warn_of_lost_augmentation(config, cache)
    return cache


def _warn_of_lost_augmentation(config: LatentDiffusionTrainingConfig, cache: LatentCache) -> None:
    """A cache holds each image once or once each way: augmentation does not reach it."""
    data = config.data
    if not cache.has_flips and (config.cache_flips or (data is not None and data.horizontal_flip)):
        logger.warning(
            "%s holds no mirrored images, so none are trained on; make it with flips (fastldm "
            "encode --flips true) to have them", cache.folder,
        )  # fmt: skip
    if data is not None and (data.crop == "random" or data.vertical_flip):
        logger.warning(
            "%s holds one crop of each image: data.crop='random' and data.vertical_flip have no "
            "effect on it; with latent_cache: null they do", cache.folder,
        )  # fmt: skip
