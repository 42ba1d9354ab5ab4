from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image

from fastldm.data import DataConfig, ImageDataset, load_images
from fastldm.data.sources import emoji
from fastldm.errors import DataError

INSTALL = "apt install fonts-noto-color-emoji unicode-data"


def installed_font() -> Path | None:
    try:
        return emoji.find_font()
    except DataError:
        return None


needs_font = pytest.mark.skipif(
    installed_font() is None, reason=f"the emoji font is not installed: {INSTALL}"
)
needs_groups = pytest.mark.skipif(
    not any(Path(file).is_file() for file in emoji.GROUP_FILES),
    reason=f"emoji-test.txt is not installed: {INSTALL}",
)


def load(*, split: Any = "train", **values: Any) -> ImageDataset:
    dataset = load_images(DataConfig("emoji", **{"resolution": 32, **values}), split=split)
    assert isinstance(dataset, ImageDataset)
    return dataset


@pytest.fixture(scope="module")
def everything() -> ImageDataset:
    return load(holdout_fraction=0)


@needs_font
def test_about_1900_emoji_have_captions(everything: ImageDataset) -> None:
    captions = everything.captions
    assert captions is not None
    assert 1700 < len(captions) < 2100
    assert {"grinning face", "flag of Japan", "flag of Scotland", "pizza", "rainbow flag"} <= set(
        captions
    )
    assert not any("_" in caption or ":" in caption[:1] for caption in captions)
    assert not any("skin tone" in caption for caption in captions)
    assert len(set(everything.names)) == len(everything)


@needs_font
def test_skin_tones_can_be_included(everything: ImageDataset) -> None:
    captions = load(holdout_fraction=0, emoji_skin_tones=True).captions
    assert captions is not None
    assert "waving hand medium skin tone" in captions
    assert len(captions) > len(everything) + 1500


@needs_font
def test_an_image_is_that_of_the_font_on_a_white_square(everything: ImageDataset) -> None:
    """The path by hand: glyph of the code point, PNG, white below, 4 rows more above and below."""
    font = TTFont(emoji.find_font())
    data = font["CBDT"].strikeData[0][font.getBestCmap()[0x1F355]].imageData
    drawn = Image.open(io.BytesIO(data)).convert("RGBA")
    assert drawn.size == (136, 128)
    rgba = np.asarray(drawn).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    square = np.full((136, 136, 3), 255, np.uint8)
    square[4:132] = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
    small = Image.fromarray(square).resize((32, 32), Image.Resampling.LANCZOS)
    expected = np.asarray(small).transpose(2, 0, 1) / np.float32(127.5) - 1

    captions = everything.captions
    assert captions is not None
    item = everything[captions.index("pizza")]
    assert item["name"] == "pizza"
    assert np.abs(item["pixel_values"].numpy() - expected).max() < 1e-6


@needs_font
def test_pictures_of_more_pixels_than_drawn_must_be_asked_for() -> None:
    assert load(resolution=136)[0]["pixel_values"].shape == (3, 136, 136)
    with pytest.raises(DataError, match=r"136×128 pixels, smaller than resolution=137; .*upscale"):
        load(resolution=137)


@needs_font
@needs_groups
def test_classes_are_the_ten_groups(everything: ImageDataset) -> None:
    names, labels, captions = (
        everything.class_names,
        everything.class_labels,
        everything.captions,
    )
    assert names is not None
    assert labels is not None
    assert captions is not None
    assert len(names) == 10
    by_caption = dict(zip(captions, labels, strict=True))
    assert names[by_caption["pizza"]] == "Food & Drink"
    assert names[by_caption["flag of Japan"]] == "Flags"
    assert names[by_caption["grinning face"]] == "Smileys & Emotion"
    assert load(require_classes=True)[0]["class_label"] in range(10)


@needs_font
def test_a_tenth_is_held_out_and_equal_drawings_stay_together(everything: ImageDataset) -> None:
    train, test = load(), load(split="test")
    assert set(train.names) | set(test.names) == set(everything.names)
    assert not set(train.names) & set(test.names)
    assert 0.07 < len(test) / len(everything) < 0.13
    drawings = [
        {item["pixel_values"].numpy().tobytes() for item in map(part.__getitem__, range(len(part)))}
        for part in (train, test)
    ]
    assert not drawings[0] & drawings[1]


@needs_font
def test_without_group_data_there_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "GROUP_FILES", ("/nowhere/emoji-test.txt",))
    dataset = load()
    assert dataset.class_names is None
    assert "class_label" not in dataset[0]
    message = rf"classes are required: .*/nowhere/emoji-test\.txt.*{INSTALL}"
    with pytest.raises(DataError, match=message):
        load(require_classes=True)


GROUPS = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # x E1.0 grinning face
263A FE0F ; fully-qualified # x E0.6 smiling face

# group: Food & Drink
1F34B ; fully-qualified # x E0.6 lemon
"""


def test_groups_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(GROUPS)
    groups = emoji.read_groups(path)
    assert groups == {
        (0x1F600,): "Smileys & Emotion",
        (0x263A,): "Smileys & Emotion",
        (0x1F34B,): "Food & Drink",
    }
    lime = (0x1F34B, 0x200D, 0x1F7E9)
    assert emoji.group_of(lime, groups) == "Food & Drink"
    assert emoji.group_of((0x1F3A0,), groups) is None


@needs_font
def test_emoji_newer_than_the_groups_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(GROUPS)
    monkeypatch.setattr(emoji, "GROUP_FILES", (str(path),))
    with caplog.at_level(logging.WARNING):
        dataset = load(holdout_fraction=0)
    assert {"grinning face", "smiling face", "lemon"} <= set(dataset.captions or ())
    assert len(dataset) < 10
    assert dataset.class_names == ["Smileys & Emotion", "Food & Drink"]
    assert any("emoji are left out" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("sequence", "name", "caption"),
    [
        ((0x1F600,), "grinning_face", "grinning face"),
        ((0x1F1EF, 0x1F1F5), "Japan", "flag of Japan"),
        ((0x1F3F4, 0xE0067, 0xE0062, 0xE007F), "Wales", "flag of Wales"),
        ((0x1F3F4, 0x200D, 0x2620), "pirate_flag", "pirate flag"),
    ],
)
def test_captions_are_words(sequence: tuple[int, ...], name: str, caption: str) -> None:
    assert emoji.caption_of(sequence, name) == caption


def test_a_missing_font_says_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "FONT_FOLDERS", (str(tmp_path),))
    monkeypatch.delenv(emoji.FONT_VARIABLE, raising=False)
    with pytest.raises(DataError, match=INSTALL):
        load()
    with pytest.raises(DataError, match=r"font_path=/nowhere\.ttf: no such font"):
        load(font_path="/nowhere.ttf")
    monkeypatch.setenv(emoji.FONT_VARIABLE, "/elsewhere.ttf")
    with pytest.raises(DataError, match=r"\$FASTLDM_EMOJI_FONT=/elsewhere\.ttf"):
        load()


def test_a_font_is_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("given.ttf", "variable.ttf", "deep/in/NotoColorEmoji.ttf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(emoji, "FONT_FOLDERS", (str(tmp_path),))
    monkeypatch.delenv(emoji.FONT_VARIABLE, raising=False)
    assert emoji.find_font() == tmp_path / "deep/in/NotoColorEmoji.ttf"
    monkeypatch.setenv(emoji.FONT_VARIABLE, str(tmp_path / "variable.ttf"))
    assert emoji.find_font() == tmp_path / "variable.ttf"
    assert emoji.find_font(str(tmp_path / "given.ttf")) == tmp_path / "given.ttf"


def test_files_that_are_no_colour_font_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(DataError, match=r"text\.ttf: not a font"):
        load(font_path=str(tmp_path / "text.ttf"))
    font = TTFont()
    font.setGlyphOrder([".notdef"])
    font.save(tmp_path / "plain.ttf")
    with pytest.raises(DataError, match="no bitmaps"):
        load(font_path=str(tmp_path / "plain.ttf"))


@needs_font
def test_a_second_epoch_comes_from_memory(everything: ImageDataset) -> None:
    first = everything[0]["pixel_values"]
    assert torch.equal(first, everything[0]["pixel_values"])
    assert sum(array.nbytes for array, _ in everything._cache.values()) <= 2000 * 32 * 32 * 3
