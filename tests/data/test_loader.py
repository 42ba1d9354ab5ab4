from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches

from fastldm.data import DataConfig, ImageDataLoader, build_dataloader, collate, load_images
from fastldm.errors import ConfigError, DataError

Pixels = Callable[..., np.ndarray]


def make_loader(
    folder: Path, batch_size: int = 5, *, options: dict[str, Any] | None = None, **values: Any
) -> ImageDataLoader:
    config = DataConfig(
        str(folder), **{"resolution": 16, "crop": "random", "horizontal_flip": True, **values}
    )
    return build_dataloader(config, load_images(config), batch_size, **(options or {}))


def names_of(batches: Any) -> list[list[str]]:
    return [batch["name"] for batch in batches]


def pixels_of(batches: Any) -> torch.Tensor:
    return torch.cat([batch["pixel_values"] for batch in batches])


def test_collate_stacks_gathers_and_lists() -> None:
    items = [
        {"pixel_values": torch.full((3, 2, 2), i), "class_label": i, "caption": str(i)}
        for i in (4, 5)
    ]
    batch = collate(items)
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["class_label"].dtype == torch.int64
    assert batch["class_label"].tolist() == [4, 5]
    assert batch["caption"] == ["4", "5"]


def test_every_epoch_has_all_images_in_a_new_order(image_folder: Path) -> None:
    loader = make_loader(image_folder, 4)
    epochs = [names_of(loader) for _ in range(3)]
    flat = [list(itertools.chain(*epoch)) for epoch in epochs]
    assert all(sorted(names) == [f"{n:02d}.png" for n in range(12)] for names in flat)
    assert flat[0] != flat[1] != flat[2]
    assert loader.epoch == 3


def test_order_and_pixels_do_not_depend_on_workers(image_folder: Path) -> None:
    alone, helped = (make_loader(image_folder, 4, num_workers=n) for n in (0, 2))
    for _ in range(3):
        first, second = list(alone), list(helped)
        assert names_of(first) == names_of(second)
        assert torch.equal(pixels_of(first), pixels_of(second))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_within_an_epoch_gives_the_same_batches(
    image_folder: Path, num_workers: int
) -> None:
    whole = make_loader(image_folder, 2)
    expected = [*whole, *whole, *whole]
    resumed = make_loader(image_folder, 2, num_workers=num_workers)
    resumed.set_epoch(1, start_batch=4)
    got = [*resumed, *resumed]
    assert names_of(got) == names_of(expected[10:])
    assert torch.equal(pixels_of(got), pixels_of(expected[10:]))


def test_seeds_give_other_orders(image_folder: Path) -> None:
    assert names_of(make_loader(image_folder)) != names_of(make_loader(image_folder, seed=1))


def test_the_global_random_numbers_are_left_alone(image_folder: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(make_loader(image_folder))
    assert torch.equal(torch.get_rng_state(), state)


def test_last_batch_is_dropped_only_when_shuffled(image_folder: Path) -> None:
    shuffled = make_loader(image_folder, 5)
    assert [len(names) for names in names_of(shuffled)] == [5, 5]
    assert len(shuffled) == 2
    ordered = make_loader(image_folder, 5, options={"shuffle": False})
    assert names_of(ordered)[2] == ["10.png", "11.png"]
    assert len(ordered) == 3


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_each_global_batch(image_folder: Path, num_processes: int) -> None:
    size = 6 // num_processes
    alone = names_of(make_loader(image_folder, 6))
    parts = [
        names_of(
            make_loader(
                image_folder,
                size,
                options={"num_processes": num_processes, "process_index": index},
            )
        )
        for index in range(num_processes)
    ]
    together = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert together == alone


def test_processes_have_equally_many_images_without_drop_last(image_folder: Path) -> None:
    parts = [
        names_of(
            make_loader(
                image_folder,
                5,
                options={"shuffle": False, "num_processes": 2, "process_index": index},
            )
        )
        for index in (0, 1)
    ]
    assert [[len(names) for names in part] for part in parts] == [[5, 5], [5, 5]]
    seen = set(itertools.chain(*itertools.chain(*parts)))
    assert seen == {f"{n:02d}.png" for n in range(12)}


def test_accelerate_prepares_the_loader(image_folder: Path) -> None:
    expected = [*(own := make_loader(image_folder, 4)), *own]
    prepared = Accelerator(cpu=True).prepare(make_loader(image_folder, 4))
    got = [*prepared, *prepared]
    assert names_of(got) == names_of(expected)
    assert torch.equal(pixels_of(got), pixels_of(expected))
    prepared.set_epoch(1)
    resumed = list(skip_first_batches(prepared, 2))
    assert names_of(resumed) == names_of(expected[5:])


def test_accelerate_shares_batches_over_processes(image_folder: Path) -> None:
    Accelerator(cpu=True)
    alone = make_loader(image_folder, 6)
    expected = [*alone, *alone]
    parts = []
    for index in (0, 1):
        loader = prepare_data_loader(
            make_loader(image_folder, 3),
            num_processes=2,
            process_index=index,
            put_on_device=False,
            dispatch_batches=False,
        )
        parts.append([*loader, *loader])
    together = [list(zip(*pair, strict=True)) for pair in zip(*parts, strict=True)]
    assert len(together) == len(expected)
    names = [first["name"] + second["name"] for first, second in zip(*parts, strict=True)]
    assert names == names_of(expected)
    merged = [
        torch.cat([first["pixel_values"], second["pixel_values"]])
        for first, second in zip(*parts, strict=True)
    ]
    assert torch.equal(torch.cat(merged), pixels_of(expected))


@pytest.mark.parametrize(
    ("batch_size", "options", "error", "message"),
    [
        (0, {}, ConfigError, "batch_size"),
        (2, {"num_processes": 0}, ConfigError, "num_processes"),
        (2, {"num_processes": 2, "process_index": 2}, ConfigError, r"process_index must be in 0…1"),
        (13, {}, DataError, "12 images, fewer than one step takes: batch_size=13 × 1 process$"),
        (7, {"num_processes": 2}, DataError, "batch_size=7 × 2 processes"),
    ],
)
def test_wrong_sizes_are_named(
    image_folder: Path, batch_size: int, options: dict[str, int], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        make_loader(image_folder, batch_size, options=options)


def test_negative_positions_are_refused(image_folder: Path) -> None:
    loader = make_loader(image_folder)
    with pytest.raises(ConfigError, match="got -1 and 0"):
        loader.set_epoch(-1)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_iteration_that_was_broken_off_starts_again_where_it_began(
    image_folder: Path, streaming: bool
) -> None:
    loader = make_loader(image_folder, 2, streaming=streaming)
    loader.set_epoch(1, start_batch=3)
    first = next(iter(loader))["name"]
    rest = names_of(loader)
    assert rest[0] == first
    assert len(rest) == 3
    assert len(names_of(loader)) == 6
