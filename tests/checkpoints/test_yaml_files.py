"""YAML files as plain values: types, limits, and nothing that is built or looked up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastldm.checkpoints.single_file import read_config
from fastldm.checkpoints.yaml_files import child, parse_fields, read_yaml, short
from fastldm.errors import CheckpointError, ConfigError

DOUBLING = "\n".join(
    [f"a0: &a0 {['x'] * 9}", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 30))]
)
MERGING = "a: &a {k: 1}\nb: &b {<<: [*a, *a]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "not a plain YAML file"),
        ("a: !!python/name:os.system", "not a plain YAML file"),
        (DOUBLING, "an alias"),
        (MERGING, "an alias"),
        ("a: [1, 2", "not a plain YAML file"),
        ("- 1\n- 2", "expected a mapping, got list"),
        ("", "expected a mapping, got NoneType"),
        ("a: " + "[" * 60_000, "brackets inside brackets, more than 20 deep"),
        ("a: " + "{a: " * 15_000, "brackets inside brackets, more than 20 deep"),
        ("- " * 30_000, "not a plain YAML file"),
        ("a: 1" * 30_000, "120000 bytes; accepted: at most 65536"),
        ("a: \udcff", "not a plain YAML file"),
        ("? [1, 2]\n: 3", "not a plain YAML file|expected"),
    ],
)
def test_files_that_are_no_plain_mapping_are_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message) as caught:
        parse_fields(Fields, read_yaml(path), "config")
    assert len(str(caught.value)) < 600


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(CheckpointError, match="not a file"):
        read_yaml(tmp_path)


@dataclass(frozen=True)
class Fields:
    size: int
    rate: float = 1.0
    flag: bool = False
    sizes: int | tuple[int, ...] = 1
    name: str | None = None


def test_values_are_taken_as_what_they_are_declared() -> None:
    given = {"size": 3, "rate": "1e-4", "flag": True, "sizes": [1, 2], "name": None, "note": []}
    assert parse_fields(Fields, given, "x", frozenset({"note"})) == Fields(3, 1e-4, True, (1, 2))
    assert parse_fields(Fields, {"size": 3, "rate": 2}, "x") == Fields(3, 2.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "x.size: missing"),
        ({"size": True}, "x.size: expected an integer, got True"),
        ({"size": 1.0}, "x.size: expected an integer, got 1.0"),
        ({"size": "${oc.env:HOME}"}, r"x.size: expected an integer, got '\$"),
        ({"size": {}}, "x.size: expected an integer, got a mapping"),
        ({"size": 1, "rate": "nan"}, "x.rate: expected a number, got 'nan'"),
        ({"size": 1, "rate": 10**400}, "x.rate: expected a number, got 1000"),
        ({"size": 1, "flag": 1}, "x.flag: expected true or false, got 1"),
        ({"size": 1, "sizes": ["1"]}, "x.sizes: expected an integer or a list of an integer"),
        ({"size": 1, "name": 3}, "x.name: expected a string or null, got 3"),
        ({"size": 1, "shape": 3, 7: 1}, "x: fastldm does not know 'shape', 7"),
    ],
)
def test_values_of_another_type_are_named(given: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_fields(Fields, given, "x")


def test_messages_stay_short() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    assert short(deep) == "a list of 1"
    assert len(short("x" * 10**6)) < 70
    with pytest.raises(ConfigError, match=r"x\.a: expected a mapping, got a list of 1"):
        child({"a": deep}, "a", "x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": [1]}, "model: expected a mapping"),
        ({"model": {"target": 3, "params": {"a": 1}}}, "target: expected a dotted name, got 3"),
        ({"model": {"target": "x.Y"}}, "expected a YAML file of CompVis"),
        ({"params": {}}, "expected a YAML file of CompVis"),
        ({"params": {"unet_config": {"params": {}}}}, "unet_config.params.in_channels: missing"),
        ({"params": {"unet_config": 3}}, "unet_config: expected a mapping, got 3"),
    ],
)
def test_configs_of_no_model_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(config)
