from __future__ import annotations

from typing import Any

import pytest

from fastldm.data import DataConfig
from fastldm.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"source": ""}, "source"),
        ({"source": 3}, "source"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": 64.0}, "resolution"),
        ({"resolution": True}, "resolution"),
        ({"channels": 0}, "channels"),
        ({"crop": "middle"}, "'center', 'random', 'pad', 'none'"),
        ({"interpolation": "cubic"}, "'bicubic'"),
        ({"holdout_fraction": 1.0}, "holdout_fraction"),
        ({"holdout_fraction": -0.1}, "holdout_fraction"),
        ({"value_range": (1.0, 0.0)}, "value_range"),
        ({"value_range": (0.0, float("nan"))}, "value_range"),
        ({"value_range": (0.0,)}, "value_range"),
        ({"class_names": ("a", "b", "a")}, "class_names"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
        ({"shuffle_buffer": 0}, "shuffle_buffer"),
        ({"tile": 0}, "tile"),
        ({"tile": 32, "resolution": 64}, "upscale"),
        ({"tile": 64, "resolution": 64, "crop": "pad"}, "crop='pad'"),
        ({"tile": 64, "resolution": 64, "streaming": True}, "streaming"),
        ({"tile": 64, "resolution": 64, "source": "webdataset:x.tar"}, "streaming"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DataConfig(**{"source": "photos", **values})


def test_lists_from_yaml_become_tuples() -> None:
    config = DataConfig("photos", value_range=[-1, 1], class_names=["a", "b"])  # type: ignore[arg-type]
    assert config.value_range == (-1, 1)
    assert config.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("source", "streaming", "streams"),
    [
        ("photos", False, False),
        ("photos", True, True),
        ("webdataset:shards", False, True),
        ("shards/000.tar", False, True),
        ("emoji", False, False),
    ],
)
def test_webdatasets_always_stream(source: str, streaming: bool, streams: bool) -> None:
    assert DataConfig(source, streaming=streaming).streams is streams
