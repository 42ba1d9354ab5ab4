from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.data import DataConfig
from fastldm.data.transforms import (
    Augmentation,
    check_size,
    finish,
    pad_to_square,
    prepare,
    to_pixel_values,
)
from fastldm.errors import DataError

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


def config(**values: Any) -> DataConfig:
    return DataConfig("photos", **{"resolution": 16, **values})


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (33, 33)])
def test_resize_and_centre_crop_are_pils(
    rng: np.random.Generator, interpolation: Any, size: tuple[int, int]
) -> None:
    array = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    settings = config(interpolation=interpolation)
    values = finish(prepare(array, settings, pad=False), settings, Augmentation())

    height, width = size
    scale = 16 / min(size)
    wide, high = round(width * scale), round(height * scale)
    resized = Image.fromarray(array).resize((wide, high), FILTERS[interpolation])
    left, top = (wide - 16) // 2, (high - 16) // 2
    cropped = np.asarray(resized.crop((left, top, left + 16, top + 16)))
    expected = cropped.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-7)


def test_8_and_16_bits_map_their_ends_to_minus_one_and_one() -> None:
    settings = config(resolution=2, channels=1)
    for dtype in (np.uint8, np.uint16):
        top = np.iinfo(dtype).max
        array = np.array([[0, top], [top // 3, top // 5]], dtype)[..., None]
        values = finish(prepare(array, settings, pad=False), settings, Augmentation())
        expected = array[..., 0].astype(np.float64) / (top / 2) - 1
        np.testing.assert_allclose(values[0].numpy(), expected, rtol=0, atol=1e-7)


def test_all_16_bit_values_stay_distinct_and_come_back() -> None:
    array = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    values = prepare(array, config(resolution=256, channels=1), pad=False)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(np.rint((values.astype(np.float64) + 1) * 32767.5), array)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (-1000.0, 3000.0)])
def test_floats_are_mapped_by_their_range(
    rng: np.random.Generator, value_range: tuple[float, float]
) -> None:
    low, high = value_range
    unit = rng.random((16, 16, 5)).astype(np.float32)
    array = (low + unit.astype(np.float64) * (high - low)).astype(np.float32)
    values = prepare(array, config(channels=5, value_range=value_range), pad=False)
    np.testing.assert_allclose(values, unit * 2 - 1, atol=1e-5)


@pytest.mark.parametrize("wrong", [-0.5, 1.5, 255.0, np.nan, np.inf])
def test_floats_outside_their_range_are_refused(wrong: float) -> None:
    array = np.full((16, 16, 1), 0.5, np.float32)
    array[3, 4] = wrong
    with pytest.raises(DataError, match=r"outside value_range=\(0, 1\)"):
        prepare(array, config(channels=1), pad=False)


@pytest.mark.parametrize("kind", ["uint16", "float"])
def test_deep_images_are_resized_with_the_same_filter(rng: np.random.Generator, kind: str) -> None:
    unit = rng.random((40, 40, 2))
    deep = unit.astype(np.float32) if kind == "float" else (unit * 65535).astype(np.uint16)
    resized = prepare(deep, config(channels=2), pad=False)
    shallow = prepare((unit * 255).round().astype(np.uint8), config(channels=2), pad=False)
    np.testing.assert_allclose(resized, shallow / 127.5 - 1, atol=0.015)


def test_overshoot_is_clipped() -> None:
    array = np.zeros((64, 64, 1), np.uint16)
    array[:, 32:] = 65535
    values = prepare(array, config(resolution=24, channels=1), pad=False)
    assert values.min() == -1
    assert values.max() == 1


def test_padding_is_white_and_even(rng: np.random.Generator) -> None:
    array = rng.integers(0, 255, (4, 9, 3), dtype=np.uint8)
    padded = pad_to_square(array)
    assert padded.shape == (9, 9, 3)
    np.testing.assert_array_equal(padded[2:6], array)
    assert (np.delete(padded, slice(2, 6), axis=0) == 255).all()
    assert pad_to_square(np.zeros((2, 4, 1), np.float32))[0].max() == 1.0


def test_random_crops_reach_every_position_and_only_those(rng: np.random.Generator) -> None:
    array = rng.integers(0, 256, (16, 19, 3), dtype=np.uint8)
    settings = config(crop="random")
    windows = {
        start: to_pixel_values(array[:, start : start + 16]).numpy().tobytes() for start in range(4)
    }
    seen = set()
    for index in range(100):
        augmentation = Augmentation.draw(settings, epoch=0, index=index)
        values = finish(prepare(array, settings, pad=False), settings, augmentation)
        seen.add(values.numpy().tobytes())
    assert seen == set(windows.values())


def test_augmentation_depends_on_seed_epoch_and_index() -> None:
    settings = config(crop="random", horizontal_flip=True, vertical_flip=True)
    base = Augmentation.draw(settings, 3, 5)
    assert base == Augmentation.draw(settings, 3, 5)
    assert base.top != Augmentation.draw(settings, 4, 5).top
    assert base.top != Augmentation.draw(settings, 3, 6).top
    assert base.top != Augmentation.draw(config(crop="random", seed=1), 3, 5).top
    assert base.top == Augmentation.draw(config(crop="random"), 3, 5).top


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_flips_happen_half_the_time_and_only_when_asked(axis: str) -> None:
    settings = config(**{f"{axis}_flip": True})
    draws = [Augmentation.draw(settings, 0, index) for index in range(1000)]
    assert 430 < sum(getattr(draw, f"flip_{axis}") for draw in draws) < 570
    other = "vertical" if axis == "horizontal" else "horizontal"
    assert not any(getattr(draw, f"flip_{other}") for draw in draws)


def test_flips_mirror_the_right_axis(rng: np.random.Generator) -> None:
    array = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain = to_pixel_values(array)
    mirrored = finish(array, config(), Augmentation(flip_horizontal=True))
    upside_down = finish(array, config(), Augmentation(flip_vertical=True))
    assert torch.equal(mirrored, plain.flip(2))
    assert torch.equal(upside_down, plain.flip(1))


@pytest.mark.parametrize(
    ("size", "values", "pad", "message"),
    [
        ((15, 40), {}, False, r"40×15 pixels, smaller than resolution=16"),
        ((10, 12), {}, True, "smaller than resolution=16"),
        ((16, 17), {"crop": "none"}, False, "17×16 pixels; crop='none' wants exactly"),
        ((50, 31), {"tile": 32}, False, "31×50 pixels, smaller than tile=32"),
    ],
)
def test_a_wrong_size_is_named(
    size: tuple[int, int], values: dict[str, Any], pad: bool, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        check_size(*size, config(**values), pad)


def test_upscaling_must_be_allowed(rng: np.random.Generator) -> None:
    array = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    assert prepare(array, config(upscale=True), pad=False).shape == (16, 20, 3)
    check_size(16, 12, config(), pad=True)


def test_pixel_values_do_not_share_memory_with_the_image() -> None:
    array = np.zeros((4, 4, 1), np.float32)
    to_pixel_values(array).fill_(1.0)
    assert array.max() == 0
