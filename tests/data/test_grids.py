from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.data import image_grid, save_image_grid
from fastldm.errors import DataError


def test_images_lie_row_by_row_with_their_values() -> None:
    images = torch.rand(5, 3, 70, 80) * 2 - 1
    grid = image_grid(images, columns=3)
    assert grid.shape == (2 * 72 + 2, 3 * 82 + 2, 3)
    cell = grid[2 + 72 : 2 + 72 + 70, 2 + 82 : 2 + 82 + 80]
    expected = ((images[4].double() + 1) * 127.5).round().permute(1, 2, 0)
    assert np.abs(cell.astype(np.float64) - expected.numpy()).max() <= 1
    assert (grid[2 + 72 :, 2 + 2 * 82 :] == 255).all()


def test_values_outside_are_clipped_and_nan_is_black() -> None:
    image = torch.tensor([-5.0, 5.0, float("nan"), float("inf")]).view(4, 1, 1, 1)
    grid = image_grid(image.expand(4, 1, 64, 64), columns=4)
    assert [int(grid[30, 30 + 66 * column, 0]) for column in range(4)] == [0, 255, 0, 255]


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_other_channel_counts(channels: int, shown: list[int]) -> None:
    images = torch.linspace(-1, 1, channels).view(1, channels, 1, 1).expand(1, -1, 64, 64)
    grid = image_grid(images)
    expected = [round(float((images[0, channel, 0, 0] + 1) * 127.5)) for channel in shown]
    assert grid[30, 30].tolist() == expected


def test_small_images_are_enlarged_to_be_seen() -> None:
    images = torch.zeros(1, 1, 30, 30)
    images[0, 0, 3, 4] = 1
    grid = image_grid(images)
    assert grid.shape == (94, 94, 3)
    assert (grid[2 + 9 : 2 + 12, 2 + 12 : 2 + 15] == 255).all()
    assert (grid[2:92, 2:92] == 255).sum() == 9 * 3


def test_captions_are_written_below_their_images() -> None:
    images = torch.ones(2, 3, 64, 64)
    grid = image_grid(
        images, columns=2, captions=["a word", "seven words that go on and on and on"]
    )
    assert grid.shape[0] == 64 + 3 * 12 + 4
    below = grid[2 + 64 :]
    assert (below[:12, :68] < 128).any()
    assert (below[12:, :66] == 255).all()
    assert (below[24:36, 68:] < 128).any()


@pytest.mark.parametrize("caption", ["MMM WWW MMM WWW", "money-mouth face", "W" * 60, "i" * 90])
def test_captions_stay_within_their_column(caption: str) -> None:
    grid = image_grid(torch.ones(2, 3, 64, 64), columns=2, captions=[caption, ""])
    assert (grid[66:, :67] < 128).any()
    assert (grid[66:, 67:] == 255).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\[N, C, H, W\]"):
        image_grid(torch.zeros(shape))


def test_captions_must_be_as_many_as_images() -> None:
    with pytest.raises(DataError, match="2 images but 1 captions"):
        image_grid(torch.zeros(2, 3, 8, 8), captions=["one"])


def test_the_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "grid.png"
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    save_image_grid(images, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image_grid(images))
    before = path.read_bytes()

    def fail(self: Image.Image, file: Path, format: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_image_grid(-images, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]
