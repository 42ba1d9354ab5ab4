from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.data import (
    DataConfig,
    ImageDataLoader,
    StreamingImageDataset,
    build_dataloader,
    load_images,
)
from fastldm.errors import DataError


def stream(folder: Path, *, split: Any = "train", **values: Any) -> StreamingImageDataset:
    config = DataConfig(
        str(folder),
        **{"resolution": 16, "streaming": True, "crop": "random", "shuffle_buffer": 5, **values},
    )
    dataset = load_images(config, split=split)
    assert isinstance(dataset, StreamingImageDataset)
    return dataset


def make_loader(
    folder: Path, batch_size: int = 5, *, options: dict[str, Any] | None = None, **values: Any
) -> ImageDataLoader:
    dataset = stream(folder, **values)
    return build_dataloader(dataset.config, dataset, batch_size, **(options or {}))


def names_of(batches: Any) -> list[list[str]]:
    return [batch["name"] for batch in batches]


def pixels_of(batches: Any) -> torch.Tensor:
    return torch.cat([batch["pixel_values"] for batch in batches])


ALL_NAMES = [f"{n:02d}.png" for n in range(12)]


def test_a_folder_can_be_streamed(captioned_folder: Path) -> None:
    dataset = stream(captioned_folder, class_field="kind")
    items = list(dataset)
    assert sorted(item["name"] for item in items) == ALL_NAMES
    assert all(item["caption"] == f"picture {int(item['name'][:2])}" for item in items)
    assert dataset.class_names == ["a", "b"]


def test_each_epoch_has_an_order_of_its_own_that_repeats(image_folder: Path) -> None:
    loader = make_loader(image_folder, 4)
    epochs = [names_of(loader) for _ in range(3)]
    assert all(sorted(itertools.chain(*epoch)) == ALL_NAMES for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    loader.set_epoch(1)
    assert names_of(loader) == epochs[1]
    assert names_of(make_loader(image_folder, 4, seed=3)) != epochs[0]


def test_test_images_keep_the_order_of_the_source(image_folder: Path) -> None:
    dataset = stream(image_folder, split="test", holdout_fraction=0.5)
    names = [item["name"] for item in dataset]
    assert names == sorted(names)
    dataset.set_epoch(4)
    assert names == [item["name"] for item in dataset]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_order_and_pixels_do_not_depend_on_workers(image_folder: Path, batch_size: int) -> None:
    alone, helped = (make_loader(image_folder, batch_size, num_workers=n) for n in (0, 2))
    for _ in range(2):
        first, second = list(alone), list(helped)
        assert names_of(first) == names_of(second)
        assert torch.equal(pixels_of(first), pixels_of(second))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_within_an_epoch(image_folder: Path, num_workers: int) -> None:
    whole = make_loader(image_folder, 2)
    expected = [*whole, *whole, *whole]
    resumed = make_loader(image_folder, 2, num_workers=num_workers)
    resumed.set_epoch(1, start_batch=3)
    got = [*resumed, *resumed]
    assert names_of(got) == names_of(expected[9:])
    assert torch.equal(pixels_of(got), pixels_of(expected[9:]))


def test_processes_share_each_global_batch(image_folder: Path) -> None:
    alone = names_of(make_loader(image_folder, 6))
    parts = [
        names_of(make_loader(image_folder, 3, options={"num_processes": 2, "process_index": index}))
        for index in (0, 1)
    ]
    assert [first + second for first, second in zip(*parts, strict=True)] == alone


def test_the_last_batch(image_folder: Path) -> None:
    sizes = [len(names) for names in names_of(make_loader(image_folder, 5))]
    assert sizes == [5, 5]
    ordered = {"shuffle": False}
    sizes = [len(n) for n in names_of(make_loader(image_folder, 5, options=ordered))]
    assert sizes == [5, 5, 2]
    parts = [
        names_of(
            make_loader(
                image_folder, 5, options={**ordered, "num_processes": 2, "process_index": index}
            )
        )
        for index in (0, 1)
    ]
    assert [[len(names) for names in part] for part in parts] == [[5, 5], [5, 5]]
    assert set(itertools.chain(*itertools.chain(*parts))) == set(ALL_NAMES)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_replaced_within_their_batch(
    image_folder: Path, break_image: Callable[[Path], None], num_workers: int
) -> None:
    for number in (1, 2, 7):
        break_image(image_folder / f"{number:02d}.png")
    loader = make_loader(image_folder, 4, options={"shuffle": False}, num_workers=num_workers)
    expected = [[0, 3, 3, 3], [4, 5, 6, 4], [8, 9, 10, 11]]
    assert names_of(loader) == [[f"{n:02d}.png" for n in batch] for batch in expected]
    assert loader.dataset.skipped_count == 3


def test_unreadable_images_are_left_out_without_batches(
    image_folder: Path, break_image: Callable[[Path], None]
) -> None:
    break_image(image_folder / "03.png")
    assert sorted(item["name"] for item in stream(image_folder)) == [
        name for name in ALL_NAMES if name != "03.png"
    ]
    with pytest.raises(DataError, match=r"unreadable image 03\.png"):
        list(stream(image_folder, strict=True))


def test_a_wholly_unreadable_batch_is_an_error(
    image_folder: Path, break_image: Callable[[Path], None]
) -> None:
    for number in range(4, 8):
        break_image(image_folder / f"{number:02d}.png")
    loader = make_loader(image_folder, 4, options={"shuffle": False})
    with pytest.raises(DataError, match=r"a whole batch of 4 .* up to 07\.png"):
        list(loader)


def test_too_small_an_image_is_named(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"\.png: the image is 24×20 pixels, smaller than resolu"):
        list(stream(image_folder, resolution=21))


def test_partial_captions(captioned_folder: Path) -> None:
    path = captioned_folder / "metadata.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:9]))
    assert "caption" not in next(iter(stream(captioned_folder)))
    with pytest.raises(DataError, match="caption missing for 3 of 12"):
        stream(captioned_folder, require_captions=True)
