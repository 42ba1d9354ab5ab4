"""The images of the Noto Color Emoji font with the names and groups of Unicode.

Images come from the font's CBDT table (PNG, 136×128), English names from the ``emoji`` package,
groups from ``emoji-test.txt`` of the Unicode Character Database.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastldm.data.config import DataConfig
from fastldm.data.sources.table import ClassMap, Fields, ImageTable
from fastldm.errors import DataError

FONT_VARIABLE = "FASTLDM_EMOJI_FONT"
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)
GROUP_FILES = (
    "/usr/share/unicode/emoji/emoji-test.txt",
    "/usr/share/unicode-data/emoji/emoji-test.txt",
)
INSTALL_COMMAND = "apt install fonts-noto-color-emoji unicode-data"
_FONT_NAME = "NotoColorEmoji.ttf"
_VARIATION_SELECTOR = 0xFE0F
_JOINER = 0x200D
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)

Sequence = tuple[int, ...]
"""Code points of one emoji, without variation selectors."""


def read_emoji(config: DataConfig) -> ImageTable:
    """Every emoji that the font draws and the ``emoji`` package names.

    Raises:
        DataError: the font is missing or has no bitmaps; the message says the command that
            installs it.
    """
    import datasets

    path = find_font(config.font_path)
    named = _english_names(config.emoji_skin_tones)
    images = _bitmaps(path, named)
    names = {sequence: name for sequence, name in named.items() if sequence in images}
    if not names:
        raise DataError(f"{path}: the font draws none of the emoji that have a name")
    groups = _installed_groups()
    notes: list[str] = []
    if groups is not None:
        newer = {sequence for sequence in names if group_of(sequence, groups) is None}
        if newer:
            notes.append(
                f"{len(newer)} emoji are left out because the installed emoji-test.txt does not "
                f"have them yet, one being {names[min(newer)]}"
            )
            names = {key: name for key, name in names.items() if key not in newer}
    columns: dict[str, list[Any]] = {
        "image": [images[sequence] for sequence in names],
        "name": list(names.values()),
        "caption": [caption_of(sequence, name) for sequence, name in names.items()],
    }
    # Some emoji share one drawing: they stay on the same side of a split.
    first_name: dict[bytes, str] = {}
    split_keys = [first_name.setdefault(images[sequence], name) for sequence, name in names.items()]
    classes = None
    if groups is not None:
        class_names = config.class_names or tuple(dict.fromkeys(groups.values()))
        classes = ClassMap(class_names, {name: i for i, name in enumerate(class_names)})
        columns["class"] = [group_of(sequence, groups) for sequence in names]
    return ImageTable(
        rows=datasets.Dataset.from_dict(columns),
        fields=Fields("image", "caption", "class" if classes is not None else None, "name"),
        origin="emoji",
        classes=classes,
        pad_to_square=True,
        split_keys=split_keys,
        notes=notes,
        why_no_classes=f"emoji groups are read from emoji-test.txt, looked for at "
        f"{' and '.join(GROUP_FILES)}; install it: {INSTALL_COMMAND}",
    )


def find_font(font_path: str | None = None) -> Path:
    """The Noto Color Emoji font: as given, by ``$FASTLDM_EMOJI_FONT``, or in the usual folders.

    Raises:
        DataError: there is none.
    """
    for option, value in (
        ("font_path", font_path),
        (f"${FONT_VARIABLE}", os.environ.get(FONT_VARIABLE)),
    ):
        if value:
            if Path(value).is_file():
                return Path(value)
            raise DataError(f"{option}={value}: no such font file")
    for folder in FONT_FOLDERS:
        found = sorted(Path(folder).expanduser().rglob(_FONT_NAME))
        if found:
            return found[0]
    raise DataError(
        f"the emoji font {_FONT_NAME} is not in {', '.join(FONT_FOLDERS)}; install it: "
        f"{INSTALL_COMMAND}  (or set font_path or ${FONT_VARIABLE})"
    )


def caption_of(sequence: Sequence, name: str) -> str:
    """A caption in words: ``grinning_face`` is "grinning face", a country "flag of …"."""
    words = name.replace("_", " ").strip()
    country = len(sequence) == 2 and all(point in _REGIONAL_INDICATORS for point in sequence)
    subdivision = sequence[-1] in _TAGS
    return f"flag of {words}" if country or subdivision else words


def read_groups(file: Path) -> dict[Sequence, str]:
    """The group of each emoji in a file of the format of ``emoji-test.txt``."""
    groups: dict[Sequence, str] = {}
    group = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            points = (int(point, 16) for point in line.partition(";")[0].split())
            groups[_without_selectors(points)] = group
    return groups


def _installed_groups() -> dict[Sequence, str] | None:
    file = next((Path(file) for file in GROUP_FILES if Path(file).is_file()), None)
    return None if file is None else read_groups(file)


def group_of(sequence: Sequence, groups: Mapping[Sequence, str]) -> str | None:
    """The group of an emoji; one that is newer than the file has that of the emoji it extends."""
    while sequence not in groups:
        if _JOINER not in sequence:
            return None
        sequence = sequence[: len(sequence) - 1 - sequence[::-1].index(_JOINER)]
    return groups[sequence]


def _without_selectors(points: Iterable[int]) -> Sequence:
    return tuple(point for point in points if point != _VARIATION_SELECTOR)


def _english_names(skin_tones: bool) -> dict[Sequence, str]:
    """Names such as ``grinning_face``, in alphabetical order."""
    import emoji

    accepted = (emoji.STATUS["component"], emoji.STATUS["fully_qualified"])
    names = {
        _without_selectors(map(ord, text)): data["en"].strip(":")
        for text, data in emoji.EMOJI_DATA.items()
        if data["status"] in accepted
    }
    return {
        sequence: name
        for sequence, name in sorted(names.items(), key=lambda entry: entry[1])
        if skin_tones or not any(point in _SKIN_TONES for point in sequence)
    }


def _bitmaps(path: Path, sequences: Iterable[Sequence]) -> dict[Sequence, bytes]:
    """The PNG of every one of `sequences` that the font draws as one glyph."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, lazy=True) as font:
            if "CBDT" not in font:
                raise DataError(
                    f"{path}: the font has no bitmaps (CBDT table); install the one that has: "
                    f"{INSTALL_COMMAND}"
                )
            characters = font.getBestCmap()
            ligatures = _ligatures(font)
            strike = font["CBDT"].strikeData[0]
            bitmaps = {}
            for sequence in sequences:
                glyphs = tuple(characters.get(point, "") for point in sequence)
                glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs, "")
                if glyph in strike:
                    bitmaps[sequence] = bytes(strike[glyph].imageData)
            return bitmaps
    except TTLibError as error:
        raise DataError(f"{path}: not a font ({error})") from None


def _ligatures(font: Any) -> dict[tuple[str, ...], str]:
    """Glyph sequences that the font draws as one glyph."""
    ligatures: dict[tuple[str, ...], str] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            for first, entries in getattr(subtable, "ligatures", {}).items():
                for entry in entries:
                    ligatures.setdefault((first, *entry.Component), entry.LigGlyph)
    return ligatures
