"""Values that configurations refuse, and their way through YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastldm.errors import ConfigError
from fastldm.training.config import save_config, to_plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"max_steps": None}, "max_steps, max_minutes: give at least one"),
        ({"max_steps": 0}, "max_steps: expected a number above 0"),
        ({"max_minutes": -1.0}, "max_minutes"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"adam_betas": (0.5, 1.0)}, "adam_betas"),
    ],
)
def test_values_out_of_range_are_refused(
    autoencoder_config: Callable[..., Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        autoencoder_config(**fields)


def test_latents_must_come_from_somewhere(diffusion_config: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="data, latent_cache: give at least one"):
        diffusion_config(data=None)


def test_a_configuration_goes_through_yaml(
    autoencoder_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = autoencoder_config(adam_betas=(0.5, 0.9))
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text) == to_plain(config)
    assert to_plain(config)["adam_betas"] == [0.5, 0.9]
