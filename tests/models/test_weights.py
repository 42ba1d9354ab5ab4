"""Locating, reading and writing the weight files of a model folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from fastldm.errors import CheckpointError, ConfigError
from fastldm.models.weights import (
    check_state_dict,
    folder_locator,
    make_locator,
    parse_size,
    read_state_dict,
    rename_old_attention_keys,
    with_variant,
    write_model_folder,
)

NAME = "model.safetensors"


def tensors(count: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(10, generator=generator) for i in range(count)}


def write(
    folder: Path,
    state: dict[str, torch.Tensor],
    *,
    variant: str | None = None,
    shard_bytes: int = 10**9,
    name: str = NAME,
) -> None:
    write_model_folder(folder, "config.json", {"a": 1}, state, name, variant, shard_bytes)


def read(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    return read_state_dict(folder_locator(folder), NAME, variant, str(folder))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7B", 7), ("5MB", 5 * 10**6), ("1.5 kb", 1500), ("2GiB", 2 * 2**30)],
)
def test_sizes_are_read_in_their_units(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "ten", "10", "5TB", "-3MB"])
def test_an_unreadable_size_is_named(size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 80, 1])
def test_weights_come_back_as_written(tmp_path, variant, shard_bytes):
    state = tensors()
    write(tmp_path, state, variant=variant, shard_bytes=shard_bytes)
    assert_same(read(tmp_path, variant), state)
    assert len(list(tmp_path.glob("*.safetensors"))) == {10**9: 1, 80: 2, 1: 4}[shard_bytes]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(("before", "after"), [(10**9, 80), (80, 10**9), (40, 80), (80, 80)])
def test_a_second_save_leaves_nothing_of_the_first(tmp_path, before, after):
    write(tmp_path, tensors(seed=0), shard_bytes=before)
    write(tmp_path, tensors(seed=1), shard_bytes=after)
    assert_same(read(tmp_path), tensors(seed=1))
    clean = tmp_path / "clean"
    write(clean, tensors(seed=1), shard_bytes=after)
    assert {path.name for path in tmp_path.iterdir()} - {"clean"} == {
        path.name for path in clean.iterdir()
    }


def test_other_files_and_other_variants_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, tensors(seed=0), variant="fp16")
    write(tmp_path, tensors(seed=1), shard_bytes=80)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_same(read(tmp_path, "fp16"), tensors(seed=0))
    assert_same(read(tmp_path), tensors(seed=1))


@pytest.mark.parametrize("shard_bytes", [10**9, 80])
def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch, shard_bytes):
    write(tmp_path, tensors(seed=0), shard_bytes=shard_bytes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    from fastldm.models import weights

    calls = []
    real = weights.save_weights

    def disk_full(shard, path):
        calls.append(path)
        if len(calls) == (1 if shard_bytes > 80 else 2):
            raise OSError(28, "No space left on device")
        real(shard, path)

    monkeypatch.setattr(weights, "save_weights", disk_full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, tensors(seed=1), shard_bytes=shard_bytes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_under_the_hub_s_older_index_name_are_read(tmp_path):
    write(tmp_path, tensors(), variant="fp16", shard_bytes=80)
    (tmp_path / "model.safetensors.fp16.index.json").rename(
        tmp_path / "model.safetensors.index.fp16.json"
    )
    assert_same(read(tmp_path, "fp16"), tensors())


def test_a_pickle_is_read_only_where_no_safetensors_is(tmp_path):
    torch.save(tensors(seed=1), tmp_path / "model.bin")
    assert_same(read(tmp_path), tensors(seed=1))
    write(tmp_path, tensors(seed=2))
    assert_same(read(tmp_path), tensors(seed=2))


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    with open(tmp_path / "model.bin", "wb") as file:
        pickle.dump({"w0": _Harmful(tmp_path / "ran")}, file, protocol=2)
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_weights_is_said_with_the_names_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.fp16\.safetensors, model\.fp16\.bin"):
        read(tmp_path, "fp16")


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"w0": 3}}',
        '{"weight_map": {"w0": "../outside.safetensors"}}',
        '{"weight_map": {"w0": "absent.safetensors"}}',
        "{",
    ],
)
def test_a_damaged_index_is_refused(tmp_path, index):
    write(tmp_path / "inside", tensors(), shard_bytes=80)
    write(tmp_path, tensors(), name="outside.safetensors")
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read(tmp_path / "inside")


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, tensors(), shard_bytes=80)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        read(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 60, 200])
def test_a_truncated_file_is_named(tmp_path, kept):
    write(tmp_path, tensors())
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(tmp_path)


def test_another_architecture_is_described():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    given = {"a": torch.zeros(2), "b": torch.zeros(3, 1), "d": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        check_state_dict(given, expected, "here")
    for part in ("here", "missing c", "unexpected d", "b is [3, 1] in the file, [3] in the model"):
        assert part in str(caught.value)
    check_state_dict(expected, expected, "here")


def test_only_some_of_many_wrong_names_are_shown():
    with pytest.raises(CheckpointError, match="w4 and 15 more") as caught:
        check_state_dict({}, tensors(20), "here")
    assert "w5" not in str(caught.value)


def test_old_attention_names_become_the_present_ones():
    x = torch.zeros(1)
    old = {"a.query.weight": x, "a.proj_attn.bias": x, "b.key.weight": x}
    expected = ["a.to_q.weight", "a.to_out.0.bias", "b.key.weight"]
    assert sorted(rename_old_attention_keys(old, expected)) == sorted(expected)


def test_a_variant_stands_before_the_extension():
    assert with_variant("a.b.safetensors", "fp16") == "a.b.fp16.safetensors"
    assert with_variant("a.safetensors", None) == "a.safetensors"


@pytest.mark.parametrize("source", ["/no/such/folder", "./none", "a/b/c", ""])
def test_a_missing_folder_is_not_looked_for_on_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder|no weights"):
        read_state_dict(make_locator(source, None), NAME, None, source)


def test_a_hub_model_is_read_from_what_the_hub_gives(monkeypatch, tmp_path):
    write(tmp_path / "sub", tensors(), shard_bytes=80)
    asked = []

    def download(repository, name, *, subfolder, **options):
        asked.append((repository, name, subfolder, options))
        path = tmp_path / subfolder / name
        if not path.exists():
            raise EntryNotFoundError(f"404: {name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    locate = make_locator("owner/model", "sub", revision="main")
    assert_same(read_state_dict(locate, NAME, None, "owner/model"), tensors())
    assert asked[0] == ("owner/model", NAME, "sub", {"revision": "main"})


@pytest.mark.parametrize("error_type", [LocalEntryNotFoundError, OSError, HFValidationError])
def test_a_hub_that_cannot_be_reached_is_an_error_about_the_source(monkeypatch, error_type):
    def download(*_, **__):
        raise error_type("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"'owner/model' is neither a folder.*no connection"):
        make_locator("owner/model", None)("config.json")


def test_without_a_network_the_cache_serves(monkeypatch, tmp_path):
    torch.save(tensors(), tmp_path / "model.bin")
    (tmp_path / "config.json").write_text("{}")

    def download(_, name, **__):
        if not (tmp_path / name).exists():
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    locate = make_locator("owner/model", None)
    assert locate("config.json") is not None
    assert_same(read_state_dict(locate, NAME, None, "owner/model"), tensors())
