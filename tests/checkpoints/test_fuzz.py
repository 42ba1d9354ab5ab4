"""Whatever a file or a config holds, it loads or is refused by an error of fastldm's own."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from fastldm import LatentDiffusion, UNet2DModel, VQModel
from fastldm.checkpoints import load_text_encoders, read_tensors
from fastldm.checkpoints.single_file import read_config
from fastldm.errors import FastLDMError
from tests.checkpoints.test_sdxl import clip_tensors, engine, make_projected, open_clip
from tests.checkpoints.test_whole_model import MODELS, config_of, make

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([0, -1, 10**9, 2**63, "1e9", "nan", "${x}", "__is_first_stage__"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def refusal(load: Callable[..., Any], *arguments: Any, **options: Any) -> str | None:
    """What fastldm says where it refuses; None where it loads. Any other error is a failure."""
    try:
        load(*arguments, **options)
    except FastLDMError as error:
        return str(error)
    return None


def paths(node: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every entry of a nested config."""
    found = [prefix] if prefix else []
    for key in node if isinstance(node, dict) else []:
        found += paths(node[key], (*prefix, key))
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """A whole model's tensors without storage, but for its schedule."""
    torch.manual_seed(0)
    return {name: v.to("meta") if "." in name else v for name, v in make("class").items()}


CONFIG = config_of(MODELS["class"])


@FEW
@given(
    changes=st.lists(st.tuples(st.sampled_from(paths(CONFIG)), VALUES), min_size=1, max_size=3),
    added=st.dictionaries(st.text(max_size=6), VALUES, max_size=1),
)
def test_configs(whole: dict[str, Tensor], changes: list[Any], added: dict[str, Any]) -> None:
    config = copy.deepcopy(CONFIG)
    for path, value in changes:
        node = config
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[path[-1]] = value
    config.update(added)
    message = refusal(LatentDiffusion.from_single_file, whole, config=config)
    assert message is None or 0 < len(message) < 3000


@FEW
@given(text=st.one_of(st.text(max_size=60), VALUES.map(yaml.safe_dump)))
def test_yaml_texts(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = refusal(read_config, path)
    assert message is None or 0 < len(message) < 600


@FEW
@given(data=st.data())
def test_names_and_shapes(whole: dict[str, Tensor], data: st.DataObject) -> None:
    tensors = dict(whole)
    names = sorted(name for name in tensors if not name.startswith("model_ema"))
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        kind = data.draw(st.sampled_from(["drop", "rename", "reshape", "retype"]))
        tensor = tensors.pop(name, None)
        if tensor is None:
            continue
        if kind == "rename":
            number = data.draw(st.sampled_from(["0", "7", "999999999", "-1", "x", ""]))
            parts = name.split(".")
            parts[data.draw(st.integers(0, len(parts) - 1))] = number
            tensors[".".join(parts)] = tensor
        elif kind == "reshape":
            shape = data.draw(st.lists(st.integers(0, 40), max_size=4))
            tensors[name] = torch.empty(shape, device="meta")
        elif kind == "retype":
            dtype = data.draw(st.sampled_from([torch.int8, torch.bool, torch.complex64]))
            tensors[name] = tensor.to(dtype)
    config = CONFIG if data.draw(st.booleans()) else None
    for kind in (LatentDiffusion, UNet2DModel, VQModel):
        message = refusal(kind.from_single_file, tensors, config=config)
        assert message is None or 0 < len(message) < 5000


@pytest.fixture(scope="module")
def text_encoders() -> dict[str, Tensor]:
    """Both of SDXL's, without storage."""
    embedders = {"0": clip_tensors(), "1": open_clip(make_projected())}
    return {
        f"conditioner.embedders.{number}.{name}": tensor.to("meta")
        for number, tensors in embedders.items()
        for name, tensor in tensors.items()
    }


@FEW
@given(data=st.data())
def test_text_encoders(text_encoders: dict[str, Tensor], data: st.DataObject) -> None:
    tensors = dict(text_encoders)
    changed = data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3))
    for name in changed:
        tensor = tensors.pop(name, None)
        kind = data.draw(st.sampled_from(["drop", "rename", "reshape", "retype"]))
        if kind == "rename":
            parts = name.split(".")
            number = data.draw(st.sampled_from(["0", "7", "99", "999999999", "x", ""]))
            parts[data.draw(st.integers(0, len(parts) - 1))] = number
            tensors[".".join(parts)] = torch.empty(2, 3, device="meta")
        elif kind == "reshape":
            shape = data.draw(st.lists(st.integers(0, 70), max_size=3))
            tensors[name] = torch.empty(shape, device="meta")
        elif kind == "retype" and tensor is not None:
            tensors[name] = tensor.to(data.draw(st.sampled_from([torch.int8, torch.complex64])))
    message = refusal(load_text_encoders, tensors)
    assert message is None or 0 < len(message) < 5000


ENGINE = engine("base")


@FEW
@given(changes=st.lists(st.tuples(st.sampled_from(paths(ENGINE)), VALUES), min_size=1, max_size=3))
def test_configs_of_sdxl(changes: list[Any]) -> None:
    config = copy.deepcopy(ENGINE)
    for path, value in changes:
        node = config
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[path[-1]] = value
    message = refusal(read_config, config)
    assert message is None or 0 < len(message) < 600


HEADER_VALUES = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3", "X"]),
            "shape": st.lists(st.integers(-2, 2**64), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 2**64), min_size=2, max_size=2),
        }
    ),
)


@FEW
@given(
    header=st.dictionaries(st.text(max_size=9), HEADER_VALUES, max_size=4),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    body=st.binary(max_size=64),
)
def test_safetensors_headers(
    tmp_path: Path, header: dict[str, Any], length: int | None, body: bytes
) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    message = refusal(VQModel.from_single_file, path)
    assert message is not None
    assert str(path) in message


@FEW
@given(data=st.data())
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    tensors = {"encoder.conv_in.weight": torch.zeros(2, 3), "b": torch.ones(4)}
    extension = data.draw(st.sampled_from(["safetensors", "ckpt", "pt"]))
    path = tmp_path / f"model.{extension}"
    if extension == "safetensors":
        content = save(tensors)
    else:
        zipped = extension == "ckpt"
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(bytes(damaged))
    message = refusal(read_tensors, path)
    if message is None:
        assert sum(tensor.numel() for tensor in read_tensors(path).values()) <= len(content)
    else:
        assert str(path) in message
