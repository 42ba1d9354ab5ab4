"""Configs are recorded, read-only, strict about unknown fields, and survive a round trip."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from fastldm.configuration import ConfigMixin, FrozenConfig, register_to_config
from fastldm.errors import CheckpointError, ConfigError


class Thing(ConfigMixin):
    ignored_config_keys = frozenset({"harmless"})

    @register_to_config
    def __init__(self, size: int = 3, channels: tuple[int, ...] = (1, 2), name: str | None = None):
        self.size = size
        self.seen_inside = self.config.channels
        if name is None:
            self.register_config(name="default")


def test_arguments_and_defaults_are_recorded() -> None:
    thing = Thing(5)
    assert thing.config == {"size": 5, "channels": [1, 2], "name": "default"}
    assert thing.config.size == thing.config["size"] == 5
    assert thing.seen_inside == [1, 2]


def test_config_is_read_only_and_copies() -> None:
    config = Thing().config
    for change in (
        lambda: config.update(size=1),
        lambda: config.__setitem__("size", 1),
        lambda: setattr(config, "size", 1),
        lambda: config.pop("size"),
        config.clear,
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert isinstance(twin, FrozenConfig)
        assert twin == config
    with pytest.raises(AttributeError, match="nothing"):
        _ = config.nothing


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    Thing(7, channels=(4,), name="x").save_config(tmp_path / "sub")
    stored = json.loads((tmp_path / "sub" / "config.json").read_text())
    assert stored == {"_class_name": "Thing", "size": 7, "channels": [4], "name": "x"}
    thing = Thing.from_config(Thing.load_config(tmp_path, subfolder="sub"), size=8)
    assert (thing.config.size, thing.config.channels) == (8, [4])


def test_unknown_field_is_named_with_the_accepted_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"Thing has no config field 'colour', 'weight'.*channels"
    ):
        Thing.from_config({"weight": 1, "colour": 2, "_diffusers_version": "0", "harmless": 3})


def test_missing_or_strange_config_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Thing.load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object of fields, got list"):
        Thing.load_config(tmp_path)


class Extended(Thing):
    extension_fields = frozenset({"channels"})


def test_extension_fields_are_stored_only_where_they_matter() -> None:
    assert Extended(4).stored_config() == {"_class_name": "Extended", "size": 4, "name": "default"}
    assert Extended(channels=(3,)).stored_config()["channels"] == [3]
