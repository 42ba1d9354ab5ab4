from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from fastldm.data import DataConfig
from fastldm.data.sources.table import (
    ClassMap,
    Fields,
    ImageTable,
    choose_fields,
    class_map,
    clean_caption,
    image_source,
    in_holdout,
    lookup,
    split_rows,
)
from fastldm.errors import DataError

CONFIG = DataConfig("photos")
TEXT = datasets.Value("string")
INTEGER = datasets.Value("int64")


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("  a\n cat ", "a cat"),
        ("", None),
        (" \n", None),
        (None, None),
        (float("nan"), None),
        (b"caf\xc3\xa9", "café"),
        ([None, " ", "b", "c"], "b"),
        ([], None),
    ],
)
def test_captions_are_cleaned(value: Any, caption: str | None) -> None:
    assert clean_caption(value) == caption


def test_integer_classes_keep_their_value() -> None:
    classes = class_map([3, 0, None, -1, np.int64(1)], CONFIG, "photos")
    assert classes.names == ("0", "1", "2", "3")
    assert [classes.number(value) for value in (3, 0, None, -1, "")] == [3, 0, None, None, None]
    with pytest.raises(DataError, match="class 4 is not one of the 4 classes: 0, 1, 2, 3"):
        classes.number(4)


def test_named_classes_are_sorted() -> None:
    classes = class_map(["dog", "", "cat", None, "dog"], CONFIG, "photos")
    assert classes.names == ("cat", "dog")
    assert classes.number("dog") == 1
    with pytest.raises(DataError, match="class 'bird' is not one of the 2 classes: cat, dog"):
        classes.number("bird")


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([1, "a"], None, "all integers or all strings"),
        ([0, -2], None, "class -2 is negative"),
        ([0, 2], ("a", "b"), "class 2 does not fit the 2 class_names"),
        (["a", "c"], ("a", "b"), r"class 'c' is not in class_names \['a', 'b'\]"),
        ([0.5], None, r"integer or a string, got 0\.5"),
    ],
)
def test_impossible_classes(values: list[Any], names: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_map(values, DataConfig("photos", class_names=names), "photos")


def test_many_classes_are_not_all_listed() -> None:
    with pytest.raises(DataError, match="one of the 100 classes: 0, 1, 2, 3, 4, 5, 6, 7, …"):
        ClassMap(tuple(map(str, range(100)))).number("x")


def test_a_dotted_name_reaches_inside_unless_it_is_a_column() -> None:
    row = {"a": {"b": {"c": 1}}, "a.b": 2, "d": 3}
    assert [lookup(row, path) for path in ("a.b.c", "a.b", "d", "d.e", "x")] == [
        1,
        2,
        3,
        None,
        None,
    ]


def test_columns_are_found_by_type_then_by_name() -> None:
    typed = {"thumb": TEXT, "photo": datasets.Image(), "label": INTEGER, "text": TEXT}
    assert choose_fields(typed, CONFIG, "x") == Fields("photo", "text", "label", None)
    named = {"img": datasets.Value("binary"), "labels": datasets.List(INTEGER), "__key__": TEXT}
    assert choose_fields(named, CONFIG, "x") == Fields("img", None, None, "__key__")


def test_image_cells() -> None:
    assert image_source({"bytes": b"x", "path": "y"}) == b"x"
    assert image_source({"bytes": None, "path": "y"}) == "y"
    array = image_source([[0.5, 1.0]])
    assert isinstance(array, np.ndarray)
    assert array.shape == (1, 2)
    with pytest.raises(ValueError, match="no image"):
        image_source({"bytes": None, "path": None})
    with pytest.raises(DataError, match="got int"):
        image_source(3)


def test_rows_are_named_by_name_path_or_number() -> None:
    features = datasets.Features({"image": datasets.Image(decode=False), "key": TEXT})
    rows = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": b"a", "path": "a.png"}, {"bytes": b"b", "path": None}],
            "key": ["first", ""],
        },
        features=features,
    )
    by_path = ImageTable(rows, Fields("image"), "x")
    assert by_path.all_names() == ["a.png", "row 1"]
    assert [by_path.name(row, number) for number, row in enumerate(rows)] == ["a.png", "row 1"]
    by_key = ImageTable(rows, Fields("image", name="key"), "x")
    assert by_key.name(rows[0], 0) == "first"
    assert by_key.all_captions() is by_key.all_labels() is None


def test_the_held_out_share_is_as_asked() -> None:
    keys = [f"image {number}" for number in range(2000)]
    test = split_rows(keys, "test", 0.25, seed=0)
    assert 430 < len(test) < 570
    train = split_rows(keys, "train", 0.25, seed=0)
    assert sorted([*test, *train]) == list(range(2000))
    assert {number for number in range(2000) if in_holdout(keys[number], 0.25, 0)} == set(test)
    larger = split_rows(keys, "test", 0.5, seed=0)
    assert set(test) < set(larger)
    assert set(split_rows(keys, "test", 0.25, seed=1)) != set(test)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_split_is_empty(fraction: float) -> None:
    for split in ("train", "test"):
        assert len(split_rows(["a", "b", "c"], split, fraction, seed=0)) in (1, 2)
