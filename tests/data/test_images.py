from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastldm.data import DataConfig, ImageDataset, build_dataloader, load_images
from fastldm.errors import ConfigError, DataError

Pixels = Callable[..., np.ndarray]


def load(folder: Path, *, split: Any = "train", **values: Any) -> ImageDataset:
    dataset = load_images(DataConfig(str(folder), **{"resolution": 16, **values}), split=split)
    assert isinstance(dataset, ImageDataset)
    return dataset


def test_an_item_has_its_pixels_name_and_index(image_folder: Path) -> None:
    dataset = load(image_folder, resolution=20)
    item = dataset[3]
    assert set(item) == {"pixel_values", "name", "index"}
    assert (item["name"], item["index"]) == ("03.png", 3)
    array = np.asarray(Image.open(image_folder / "03.png"))[:, 2:22]
    expected = array.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(item["pixel_values"].numpy() - expected).max() < 1e-7
    assert dataset.captions is dataset.class_names is dataset.class_labels is None


def test_captions_and_classes_are_in_items_and_lists(captioned_folder: Path) -> None:
    dataset = load(captioned_folder, class_field="kind")
    assert dataset[5]["caption"] == "picture 5"
    assert dataset[5]["class_label"] == 1
    assert dataset.class_names == ["a", "b"]
    assert dataset.captions == [f"picture {n}" for n in range(12)]
    assert dataset.class_labels == [0, 1] * 6
    assert dataset.names[:2] == ["00.png", "01.png"]


def test_negative_and_outside_indices(image_folder: Path) -> None:
    dataset = load(image_folder)
    assert dataset[-1]["name"] == "11.png"
    with pytest.raises(IndexError, match="12 of a data set of 12"):
        dataset[12]


def test_training_pixels_follow_seed_and_epoch(image_folder: Path) -> None:
    values = {"crop": "random", "horizontal_flip": True, "vertical_flip": True}

    def epoch_pixels(epoch: int, **more: Any) -> torch.Tensor:
        dataset = load(image_folder, **values, **more)
        dataset.set_epoch(epoch)
        return torch.stack([item["pixel_values"] for item in map(dataset.__getitem__, range(12))])

    assert torch.equal(epoch_pixels(2), epoch_pixels(2))
    assert torch.equal(epoch_pixels(2), epoch_pixels(2, cache_megabytes=0))
    assert not torch.equal(epoch_pixels(2), epoch_pixels(3))
    assert not torch.equal(epoch_pixels(2), epoch_pixels(2, seed=1))


def test_test_images_are_the_same_in_every_epoch(image_folder: Path) -> None:
    dataset = load(
        image_folder, split="test", holdout_fraction=0.5, crop="random", horizontal_flip=True
    )
    before = dataset[0]["pixel_values"]
    dataset.set_epoch(9)
    assert torch.equal(before, dataset[0]["pixel_values"])


def test_augmentation_can_be_left_out_of_training_images(image_folder: Path) -> None:
    config = DataConfig(str(image_folder), resolution=16, crop="random", horizontal_flip=True)
    plain = load_images(config, augment=False)
    centred = load_images(DataConfig(str(image_folder), resolution=16))
    assert torch.equal(plain[4]["pixel_values"], centred[4]["pixel_values"])


def test_split_is_disjoint_complete_and_stable(image_folder: Path, pixels: Pixels) -> None:
    def names(split: str) -> set[str]:
        return set(load(image_folder, split=split, holdout_fraction=0.4).names)

    train, test = names("train"), names("test")
    assert train | test == {f"{n:02d}.png" for n in range(12)}
    assert not train & test
    assert test
    Image.fromarray(pixels()).save(image_folder / "new.png")
    assert names("train") - {"new.png"} == train
    assert names("test") - {"new.png"} == test
    assert load(image_folder, split="test", holdout_fraction=0.4, split_seed=1).names != sorted(
        test
    )


def test_a_small_holdout_still_has_one_image(image_folder: Path) -> None:
    assert len(load(image_folder, split="test", holdout_fraction=1e-9)) == 1
    assert len(load(image_folder, holdout_fraction=1e-9)) == 11


def test_test_split_without_held_out_images_says_what_to_set(image_folder: Path) -> None:
    with pytest.raises(DataError, match="holdout_fraction"):
        load(image_folder, split="test")
    with pytest.raises(ConfigError, match="'train' or 'test', got 'validation'"):
        load(image_folder, split="validation")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_named_counted_and_replaced(
    image_folder: Path,
    break_image: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    num_workers: int,
) -> None:
    for number in (4, 5, 11):
        break_image(image_folder / f"{number:02d}.png")
    dataset = load(image_folder, num_workers=num_workers)
    loader = build_dataloader(dataset.config, dataset, 4, shuffle=False)
    with caplog.at_level(logging.WARNING):
        names = [name for batch in loader for name in batch["name"]]
    expected = [f"{n:02d}.png" for n in (0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 0)]
    assert names == expected
    assert dataset.skipped == ["04.png", "05.png", "11.png"]
    assert dataset.skipped_count == 3
    if num_workers == 0:
        assert [sum(f"{n:02d}.png" in text for text in caplog.messages) for n in (4, 5, 11)] == [
            1,
            1,
            1,
        ]


def test_strict_stops_at_an_unreadable_image(
    image_folder: Path, break_image: Callable[[Path], None]
) -> None:
    break_image(image_folder / "04.png")
    dataset = load(image_folder, strict=True)
    assert dataset[3]["name"] == "03.png"
    with pytest.raises(DataError, match=r"04\.png: OSError: .*strict"):
        dataset[4]


def test_files_that_are_no_images_are_found_before_decoding(image_folder: Path) -> None:
    (image_folder / "04.png").write_text("hello")
    (image_folder / "05.png").unlink()
    (image_folder / "05.png").symlink_to(image_folder / "nowhere.png")
    assert load(image_folder).skipped == ["04.png", "05.png"]
    with pytest.raises(DataError, match=r"04\.png"):
        load(image_folder, strict=True)


def test_a_folder_without_any_readable_image_is_an_error(image_folder: Path) -> None:
    for path in image_folder.iterdir():
        path.write_text("hello")
    with pytest.raises(DataError, match="none of its 12 images is readable"):
        load(image_folder)


def test_images_that_all_fail_to_decode_are_an_error(
    image_folder: Path, break_image: Callable[[Path], None]
) -> None:
    for path in image_folder.iterdir():
        break_image(path)
    with pytest.raises(DataError, match="none of its 12 images is readable"):
        load(image_folder)[0]


def test_too_small_an_image_is_named_at_once(image_folder: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels(9, 30)).save(image_folder / "small.png")
    message = r"small\.png: the image is 30×9 pixels, smaller than resolution=16"
    with pytest.raises(DataError, match=message):
        load(image_folder)
    assert load(image_folder, upscale=True)[12]["pixel_values"].shape == (3, 16, 16)


def test_wrong_channels_are_named(image_folder: Path, rng: np.random.Generator) -> None:
    tifffile.imwrite(image_folder / "12.tif", rng.random((20, 20, 5)), planarconfig="contig")
    dataset = load(image_folder)
    with pytest.raises(DataError, match=r"12\.tif: .*channels=5, wanted are channels=3"):
        dataset[12]


def test_a_folder_of_mixed_depths(tmp_path: Path, rng: np.random.Generator) -> None:
    unit = rng.random((20, 20, 5))
    tifffile.imwrite(tmp_path / "a.tif", (unit * 65535).astype(np.uint16), planarconfig="contig")
    tifffile.imwrite(tmp_path / "b.tif", unit.astype(np.float32), planarconfig="contig")
    np.save(tmp_path / "c.npy", (unit * 255).astype(np.uint8))
    dataset = load(tmp_path, channels=5, resolution=20)
    expected = torch.from_numpy(unit.transpose(2, 0, 1) * 2 - 1)
    for index, tolerance in enumerate([2 / 65535, 1e-6, 2 / 255]):
        assert (dataset[index]["pixel_values"] - expected).abs().max() <= 1.01 * tolerance


def test_padding(image_folder: Path) -> None:
    values = load(image_folder, crop="pad", resolution=24)[0]["pixel_values"]
    assert values.shape == (3, 24, 24)
    assert (values[:, :2] == 1).all()
    assert (values[:, -2:] == 1).all()
    array = np.asarray(Image.open(image_folder / "00.png")).transpose(2, 0, 1)
    assert np.abs(values[:, 2:-2].numpy() - (array / np.float32(127.5) - 1)).max() < 1e-6


class TestTiles:
    @pytest.fixture
    def photographs(self, tmp_path: Path, pixels: Pixels) -> Path:
        for number, size in enumerate([(50, 70), (32, 40), (64, 64)]):
            Image.fromarray(pixels(*size)).save(tmp_path / f"{number}.png")
        return tmp_path

    def test_lie_on_a_centred_grid(self, photographs: Path) -> None:
        dataset = load(photographs, tile=16)
        assert len(dataset) == 3 * 4 + 2 * 2 + 4 * 4
        array = np.asarray(Image.open(photographs / "0.png"))
        top, left = 1 + 16, 3 + 2 * 16
        tile = array[top : top + 16, left : left + 16].transpose(2, 0, 1)
        item = dataset[1 * 4 + 2]
        assert (item["name"], item["index"]) == ("0.png", 6)
        assert np.abs(item["pixel_values"].numpy() - (tile / np.float32(127.5) - 1)).max() < 1e-7
        assert dataset[12]["name"] == "1.png"
        assert dataset[31]["name"] == "2.png"
        assert dataset.names.count("1.png") == 4

    def test_are_resized(self, photographs: Path) -> None:
        array = np.asarray(Image.open(photographs / "2.png"))[:32, 32:]
        small = Image.fromarray(array).resize((16, 16), Image.Resampling.LANCZOS)
        expected = np.asarray(small).transpose(2, 0, 1) / np.float32(127.5) - 1
        values = load(photographs, tile=32)[2 + 1 + 1]["pixel_values"].numpy()
        assert np.abs(values - expected).max() < 1e-7

    def test_can_be_placed_at_random(self, photographs: Path) -> None:
        dataset = load(photographs, tile=16, crop="random")
        grid = load(photographs, tile=16)
        assert len(dataset) == len(grid)
        array = np.asarray(Image.open(photographs / "1.png"))
        windows = {
            array[y : y + 16, x : x + 16].transpose(2, 0, 1).tobytes()
            for y in range(17)
            for x in range(25)
        }
        seen = set()
        for epoch in range(20):
            dataset.set_epoch(epoch)
            values = dataset[13]["pixel_values"].add(1).mul(127.5).round().to(torch.uint8)
            seen.add(values.numpy().tobytes())
        assert seen <= windows
        assert len(seen) > 15

    def test_of_a_photograph_stay_on_one_side_of_the_split(self, photographs: Path) -> None:
        train = load(photographs, tile=16, holdout_fraction=0.4)
        test = load(photographs, tile=16, holdout_fraction=0.4, split="test")
        assert not set(train.names) & set(test.names)
        assert len(train) + len(test) == 32

    def test_changed_photographs_are_noticed(self, photographs: Path, pixels: Pixels) -> None:
        dataset = load(photographs, tile=16)
        Image.fromarray(pixels(70, 50)).save(photographs / "0.png")
        with pytest.raises(DataError, match=r"0\.png: .* 50×70 pixels, but was 70×50"):
            dataset[11]

    def test_smaller_photographs_and_broken_ones(
        self, photographs: Path, break_image: Callable[[Path], None], pixels: Pixels
    ) -> None:
        with pytest.raises(DataError, match=r"1\.png: the image is 40×32 .*smaller than tile=48"):
            load(photographs, tile=48)
        (photographs / "0.png").write_text("hello")
        break_image(photographs / "1.png")
        dataset = load(photographs, tile=16)
        assert len(dataset) == 4 + 16
        assert (dataset[1]["name"], dataset[1]["index"]) == ("2.png", 4)
        assert dataset.skipped == ["0.png", "1.png"]


def test_the_cache_keeps_to_its_limit(tmp_path: Path, pixels: Pixels) -> None:
    for number in range(4):
        Image.fromarray(pixels(512, 512)).save(tmp_path / f"{number}.png")
    config = {"resolution": 512, "cache_megabytes": 2}
    dataset = load(tmp_path, **config)
    first = [dataset[index]["pixel_values"] for index in range(4)]
    for path in tmp_path.iterdir():
        path.write_text("gone")
    assert torch.equal(dataset[0]["pixel_values"], first[0])
    assert torch.equal(dataset[1]["pixel_values"], first[1])
    assert dataset[2]["name"] == "0.png"


def test_a_pickled_data_set_leaves_its_cache_behind(image_folder: Path) -> None:
    dataset = load(image_folder)
    empty = len(pickle.dumps(dataset))
    before = dataset[1]["pixel_values"]
    copied = pickle.loads(pickle.dumps(dataset))
    assert copied._cache_room == 1024 * 2**20
    assert len(pickle.dumps(dataset)) < empty + 100
    assert torch.equal(copied[1]["pixel_values"], before)


def test_partial_captions_are_dropped_or_refused(
    captioned_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (captioned_folder / "metadata.jsonl").unlink()
    for number in range(10):
        (captioned_folder / f"{number:02d}.txt").write_text(f"text {number}")
    message = r"caption missing for 2 of 12 images: 10\.png, 11\.png"
    with pytest.raises(DataError, match=message):
        load(captioned_folder, require_captions=True)
    with pytest.raises(DataError, match=message):
        load(captioned_folder, caption_field="txt")
    dataset = load(captioned_folder)
    assert dataset.captions is None
    assert "caption" not in dataset[0]
    assert any("going on without any caption" in text for text in caplog.messages)


def test_missing_classes_are_named(captioned_folder: Path) -> None:
    path = captioned_folder / "metadata.jsonl"
    path.write_text(path.read_text().replace('"kind": "b"', '"kind": null', 1))
    with pytest.raises(DataError, match=r"class missing for 1 of 12 images: 01\.png"):
        load(captioned_folder, class_field="kind")


@pytest.mark.parametrize(("option", "what"), [("captions", "captions"), ("classes", "classes")])
def test_conditions_that_are_not_there(image_folder: Path, option: str, what: str) -> None:
    with pytest.raises(DataError, match=f"{what} are required"):
        load(image_folder, **{f"require_{option}": True})


def test_partial_classes_are_dropped_when_not_asked_for(
    captioned_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = captioned_folder / "metadata.jsonl"
    path.write_text(path.read_text().replace('"kind": "b"', '"label": "b"'))
    dataset = load(captioned_folder)
    assert dataset.class_names is None
    assert "class_label" not in dataset[1]
    assert dataset.captions is not None
    assert any("class missing for 6 of 12 images" in text for text in caplog.messages)


def test_the_only_image_cannot_be_held_out(tmp_path: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels()).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="no image is left for split="):
        load(tmp_path, holdout_fraction=0.0001, split="test")


def test_importing_the_package_loads_no_image_library() -> None:
    heavy = ("datasets", "PIL", "tifffile", "torchvision", "fontTools")
    script = f"import sys, fastldm.data; print(sorted(set({heavy}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"
