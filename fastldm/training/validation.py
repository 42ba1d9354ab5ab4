"""Held-out images that a first stage is measured and shown on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastldm.data import DataConfig, ImageDataset, collate, load_images
from fastldm.errors import NothingHeldOutError
from fastldm.metrics import psnr
from fastldm.training.environment import Environment

logger = logging.getLogger(__name__)


def fixed_items(config: DataConfig, count: int, split: str | None = None) -> dict[str, Any]:
    """Up to `count` items spread over a split, without augmentation, as one batch.

    Args:
        split: ``train`` or ``test``; by default the held-out images where there are any, else
            training images, with a warning.
    """
    quiet = replace(config, num_workers=0)
    if split is None:
        try:
            dataset = load_images(quiet, split="test", augment=False)
        except NothingHeldOutError:
            logger.warning(
                "data.holdout_fraction: nothing is held out; measuring on training images"
            )
            dataset = load_images(quiet, split="train", augment=False)
    else:
        dataset = load_images(quiet, split="test" if split == "test" else "train", augment=False)
    if not isinstance(dataset, ImageDataset):
        return collate(list(islice(dataset, count)))
    return collate([dataset[number] for number in evenly_spaced(count, len(dataset))])


def evenly_spaced(count: int, total: int) -> list[int]:
    """Up to `count` of the numbers 0…total−1, so that images sorted by class show every class."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


class HeldOutImages:
    """Images that are measured on, held in memory by the main process.

    Args:
        config: their source.
        count: how many at most.
        environment: where they are processed.
    """

    def __init__(self, config: DataConfig, count: int, environment: Environment) -> None:
        self._device = environment.device
        self.images: Tensor = torch.empty(0)
        if environment.is_main:
            self.images = fixed_items(config, count)["pixel_values"]

    def measure(self, reconstruct: Callable[[Tensor], Tensor], batch_size: int) -> dict[str, float]:
        """``val_psnr`` in dB and ``val_l1``, means over the images.

        Args:
            reconstruct: maps images [B, C, H, W] in [−1, 1] to reconstructions.
        """
        decibels, errors = [], []
        for images in self.images.split(batch_size):
            images = images.to(self._device)
            reconstructions = reconstruct(images).clamp(-1.0, 1.0)
            decibels.append(psnr(images, reconstructions))
            errors.append((images - reconstructions).abs().flatten(1).mean(1))
        return {
            "val_psnr": float(torch.cat(decibels).mean()),
            "val_l1": float(torch.cat(errors).mean()),
        }
