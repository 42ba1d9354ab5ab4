"""The latent cache: what is stored, its hashes, and its order."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.data import DataConfig, build_dataloader, load_images
from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.models import AutoencoderKL, VQModel
from fastldm.training.latent_cache import (
    LatentCache,
    LatentLoader,
    encode_dataset,
    hash_data,
    hash_first_stage,
)
from fastldm.training.registry import load_first_stage

Data = Callable[..., DataConfig]


@pytest.fixture
def model(first_stage: Path) -> AutoencoderKL:
    loaded = load_first_stage(first_stage)
    assert isinstance(loaded, AutoencoderKL)
    return loaded


def encode(model: Any, data: DataConfig, folder: Path, **options: Any) -> LatentCache:
    encode_dataset(model, data, folder, batch_size=4, progress=False, **options)
    return LatentCache(folder, hash_first_stage(model))


@pytest.mark.parametrize("shard_size", [5, 1000])
def test_posteriors_captions_and_classes_are_those_of_the_images(
    model: AutoencoderKL, data: Data, tmp_path: Path, shard_size: int
) -> None:
    cache = encode(model, data(), tmp_path / "cache", shard_size=shard_size, flips=True)
    dataset = load_images(data(), augment=False)
    assert len(cache) == len(dataset)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == (1 if shard_size > 5 else 2)
    assert cache.class_names == ["blue", "green", "red"]
    order = [7, 0, 11]
    batch = cache.batch(order)
    for row, index in enumerate(order):
        item = dataset[index]
        image = item["pixel_values"][None]
        with torch.no_grad():
            straight = model.encode(image).latent_dist
            mirrored = model.encode(image.flip(-1)).latent_dist
        torch.testing.assert_close(batch["mean"][row, 0], straight.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch["mean"][row, 1], mirrored.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            batch["logvar"][row, 1], mirrored.logvar[0], rtol=1e-4, atol=1e-5
        )
        assert batch["caption"][row] == item["caption"]
        assert batch["class_label"][row] == item["class_label"]
        assert batch["name"][row] == item["name"]
    assert not torch.equal(batch["mean"][:, 0], batch["mean"][:, 1])


def test_vq_latents_are_before_quantisation(data: Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQModel(block_out_channels=(32,), num_vq_embeddings=8, layers_per_block=1).eval()
    cache = encode(model, data(), tmp_path / "cache")
    image = load_images(data(), augment=False)[0]["pixel_values"][None]
    with torch.no_grad():
        expected = model.encode(image).latents[0]
    batch = cache.batch([0])
    torch.testing.assert_close(batch["mean"][0, 0], expected, rtol=1e-4, atol=1e-5)
    assert "logvar" not in batch


def test_order_is_that_of_the_images(model: AutoencoderKL, data: Data, tmp_path: Path) -> None:
    config = data(seed=5)
    cache = encode(model, config, tmp_path / "cache")
    for process in range(2):
        latents = LatentLoader(cache, 2, config.seed, num_processes=2, process_index=process)
        images = build_dataloader(
            config, load_images(config), 2, num_processes=2, process_index=process
        )
        for epoch, start in ((0, 0), (1, 1)):
            latents.set_epoch(epoch, start)
            images.set_epoch(epoch, start)
            names = [batch["name"] for batch in latents]
            assert names == [batch["name"] for batch in images]
            assert len(names) == len(latents) - start


def test_a_changed_model_or_data_is_noticed(
    model: AutoencoderKL, data: Data, images: Path, tmp_path: Path
) -> None:
    config = data()
    names = load_images(config, augment=False).names
    folder = tmp_path / "cache"
    encode(model, config, folder)
    first, second = hash_first_stage(model), hash_data(config, names, "train")
    LatentCache(folder, first, second)
    model.register_config(scaling_factor=2.0)
    assert hash_first_stage(model) == first
    with torch.no_grad():
        model.encoder.conv_in.bias[0] += 1e-6
    with pytest.raises(DataError, match=f"stale.*first_stage has hash {first[:16]}"):
        LatentCache(folder, hash_first_stage(model))
    assert hash_data(data(num_workers=3, seed=9), names, "train") == second
    for other in (
        hash_data(data(resolution=32, upscale=True), names, "train"),
        hash_data(config, names[1:], "train"),
        hash_data(config, names, "test"),
    ):
        with pytest.raises(DataError, match="stale latent cache: its data has hash"):
            LatentCache(folder, first, other)
    other_data = data(resolution=32, upscale=True)
    other = hash_data(other_data, names, "train")
    with pytest.raises(
        DataError, match=r"\(resolution was 16, is 32; upscale was False, is True\)"
    ):
        LatentCache(folder, first, other, other_data)
    with pytest.raises(DataError, match=r"\(the names of the images or the split differ\)"):
        LatentCache(folder, first, hash_data(config, names[1:], "train"), config)
    for same in (data(strict=True, vertical_flip=True), data(require_classes=True)):
        LatentCache(folder, first, hash_data(same, names, "train"), same)


def test_damage_is_noticed(model: AutoencoderKL, data: Data, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    encode(model, data(), folder)
    items = (folder / "items.jsonl").read_text()
    (folder / "items.jsonl").write_text(items.partition("\n")[2])
    with pytest.raises(CheckpointError, match=r"\d+ items but \d+ latents"):
        LatentCache(folder, hash_first_stage(model))
    shard = folder / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="latents-00000"):
        LatentCache(folder, hash_first_stage(model))
    with pytest.raises(CheckpointError, match=r"no latent cache: there is no index\.json in it"):
        LatentCache(tmp_path, hash_first_stage(model))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 0}))
    with pytest.raises(CheckpointError, match="not an index of format 1"):
        LatentCache(folder, hash_first_stage(model))


def test_other_folders_are_not_overwritten(
    model: AutoencoderKL, data: Data, tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files than a latent cache"):
        encode(model, data(), tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_full_disk_keeps_the_old_cache(
    model: AutoencoderKL, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    encode(model, data(), folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastldm.storage.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        encode(model, data(), folder)
    monkeypatch.undo()
    assert len(LatentCache(folder, hash_first_stage(model))) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_latents_that_are_not_finite_are_refused(
    model: AutoencoderKL, data: Data, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        encode(model, data(), tmp_path / "cache")


def test_too_few_latents_for_a_step(model: AutoencoderKL, data: Data, tmp_path: Path) -> None:
    cache = encode(model, data(), tmp_path / "cache")
    with pytest.raises(DataError, match="fewer than one step takes"):
        LatentLoader(cache, 100, 0)


def test_a_stream_is_cached_in_its_order(model: AutoencoderKL, data: Data, tmp_path: Path) -> None:
    cache = encode(model, data(streaming=True), tmp_path / "cache")
    assert sorted(cache.batch(list(range(len(cache))))["name"]) == sorted(
        load_images(data(), augment=False).names
    )
