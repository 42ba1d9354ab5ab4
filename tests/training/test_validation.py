"""Which held-out images are measured and shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastldm.training.autoencoder import AutoencoderTrainer
from fastldm.training.environment import Environment
from fastldm.training.validation import evenly_spaced


def test_evenly_spaced() -> None:
    assert evenly_spaced(3, 9) == [0, 3, 6]
    assert evenly_spaced(4, 6) == [0, 1, 3, 4]
    assert evenly_spaced(9, 2) == [0, 1]


def test_a_grid_shows_images_of_the_whole_held_out_set(
    autoencoder_config: Callable[..., Any], monkeypatch: Any
) -> None:
    config = autoencoder_config(validation_images=4, sample_images=2)
    trainer = AutoencoderTrainer(config, Environment(config))
    trainer.held_out.images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    shown: list[torch.Tensor] = []

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        shown.append(images[:, 0, 0, 0])
        return images

    monkeypatch.setattr(trainer, "_reconstruct", reconstruct)
    trainer.draw()
    assert shown[0].tolist() == [0.0, 2.0]
