from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fastldm.data import DataConfig, ImageDataset, StreamingImageDataset, load_images
from fastldm.data.sources.huggingface import expand_range
from fastldm.errors import DataError

Pixels = Callable[..., np.ndarray]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


@pytest.fixture
def table(pixels: Pixels) -> datasets.Dataset:
    """Ten captioned and labelled images, their PNG bytes in the table."""
    columns = {
        "picture": [png(pixels()) for _ in range(10)],
        "caption": [f"caption {n}" for n in range(10)],
        "label": [n % 3 for n in range(10)],
        "species": ["cat" if n % 2 else "ant" for n in range(10)],
        "weight": [0.5] * 10,
    }
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["x", "y", "z"]),
            "species": datasets.Value("string"),
            "weight": datasets.Value("float32"),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def load(source: str, *, split: Any = "train", augment: bool | None = None, **values: Any) -> Any:
    config = DataConfig(source, **{"resolution": 16, **values})
    return load_images(config, split=split, augment=augment)


def first_pixels(table: datasets.Dataset) -> np.ndarray:
    resized = table[0]["picture"].resize((16, 16), Image.Resampling.LANCZOS)
    array = np.asarray(resized).transpose(2, 0, 1)
    return array / np.float32(127.5) - 1


class TestParquet:
    @pytest.fixture
    def folder(self, table: datasets.Dataset, tmp_path: Path) -> Path:
        table.select(range(6)).to_parquet(tmp_path / "a.parquet")
        table.select(range(6, 10)).to_parquet(tmp_path / "b.parquet")
        return tmp_path

    @pytest.mark.parametrize("source", ["parquet:{}", "parquet:{}/*.parquet", "{}/[ab].parquet"])
    def test_files_folders_and_globs(
        self, folder: Path, table: datasets.Dataset, source: str
    ) -> None:
        dataset = load(source.format(folder))
        assert isinstance(dataset, ImageDataset)
        assert len(dataset) == 10
        assert dataset.captions == [f"caption {n}" for n in range(10)]
        assert dataset.class_names == ["x", "y", "z"]
        item = dataset[0]
        assert (item["caption"], item["class_label"]) == ("caption 0", 0)
        assert np.abs(item["pixel_values"].numpy() - first_pixels(table)).max() < 1e-6

    def test_columns_can_be_chosen(self, folder: Path) -> None:
        dataset = load(f"parquet:{folder}", caption_field="species", class_field="species")
        assert dataset[1]["caption"] == "cat"
        assert dataset.class_names == ["ant", "cat"]
        assert dataset.class_labels == [0, 1] * 5

    @pytest.mark.parametrize("option", ["image_field", "caption_field", "class_field"])
    def test_a_wrong_column_is_named(self, folder: Path, option: str) -> None:
        message = f"{option}='nothing' is not a column; there are 'picture', 'caption', 'label'"
        with pytest.raises(DataError, match=message):
            load(f"parquet:{folder}", **{option: "nothing"})

    def test_a_class_column_of_numbers_with_fractions(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"a class must be an integer or a string, got 0\.5"):
            load(f"parquet:{folder}", class_field="weight")

    def test_holdout(self, folder: Path) -> None:
        train = load(f"parquet:{folder}", holdout_fraction=0.3)
        test = load(f"parquet:{folder}", holdout_fraction=0.3, split="test")
        assert not set(train.captions) & set(test.captions)
        assert len(train) + len(test) == 10

    def test_streaming(self, folder: Path) -> None:
        # Unshuffled: at the end of a shuffled parquet stream datasets sleeps for seconds.
        dataset = load(f"parquet:{folder}", streaming=True, augment=False)
        assert isinstance(dataset, StreamingImageDataset)
        items = list(dataset)
        assert [item["caption"] for item in items] == [f"caption {n}" for n in range(10)]
        assert {item["class_label"] for item in items} == {0, 1, 2}
        assert dataset.class_names == ["x", "y", "z"]
        with pytest.raises(DataError, match=r"list them in class_names"):
            load(f"parquet:{folder}", streaming=True, class_field="species")
        named = load(
            f"parquet:{folder}",
            streaming=True,
            augment=False,
            class_field="species",
            class_names=("cat", "ant"),
        )
        assert [item["class_label"] for item in named] == [1, 0] * 5

    def test_unreadable_bytes_are_skipped(self, tmp_path: Path, pixels: Pixels) -> None:
        rows = {"image": [b"junk", png(pixels()), None]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "c.parquet")
        dataset = load(str(tmp_path / "c.parquet"))
        assert dataset.skipped == ["row 0", "row 2"]
        assert dataset[0]["name"] == "row 1"

    def test_missing_damaged_and_other_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no\.parquet: no such files"):
            load(str(tmp_path / "no.parquet"))
        (tmp_path / "bad.parquet").write_text("not parquet")
        with pytest.raises(DataError, match=r"bad\.parquet: cannot be read \(Arrow"):
            load(str(tmp_path / "bad.parquet"))
        datasets.Dataset.from_dict({"words": ["a"]}).to_parquet(tmp_path / "text.parquet")
        with pytest.raises(DataError, match="no image column among 'words'; name it with image_f"):
            load(str(tmp_path / "text.parquet"))


class TestSaved:
    def test_one_data_set(self, table: datasets.Dataset, tmp_path: Path) -> None:
        table.save_to_disk(tmp_path / "saved")
        dataset = load(str(tmp_path / "saved"))
        assert len(dataset) == 10
        assert dataset[9]["caption"] == "caption 9"

    def test_splits(self, table: datasets.Dataset, tmp_path: Path) -> None:
        splits = {"train": table.select(range(7)), "validation": table.select([7, 9])}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        source = str(tmp_path / "saved")
        assert len(load(source)) == 7
        test = load(source, split="test", class_field="species")
        assert test.captions == ["caption 7", "caption 9"]
        assert test.class_names == ["ant", "cat"]
        assert test.class_labels == [1, 1]
        assert (
            len(load(source, split="test", holdout_fraction=0.3))
            + len(load(source, holdout_fraction=0.3))
            == 7
        )

    def test_streaming(self, table: datasets.Dataset, tmp_path: Path) -> None:
        table.save_to_disk(tmp_path / "saved")
        dataset = load(str(tmp_path / "saved"), streaming=True, class_field="species")
        assert sorted(item["caption"] for item in dataset) == [f"caption {n}" for n in range(10)]
        assert dataset.class_names == ["ant", "cat"]

    def test_empty_and_without_train_split(self, table: datasets.Dataset, tmp_path: Path) -> None:
        table.select([]).save_to_disk(tmp_path / "empty")
        with pytest.raises(DataError, match="empty"):
            load(str(tmp_path / "empty"))
        splits = {"odd": table, "even": table}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
        with pytest.raises(DataError, match="no train split; there are odd, even"):
            load(str(tmp_path / "splits"))

    def test_images_as_arrays(self, rng: np.random.Generator, tmp_path: Path) -> None:
        arrays = rng.random((2, 16, 16, 5)).astype(np.float32)
        features = datasets.Features({"image": datasets.Array3D((16, 16, 5), "float32")})
        rows = datasets.Dataset.from_dict({"image": list(arrays)}, features=features)
        rows.save_to_disk(tmp_path / "saved")
        item = load(str(tmp_path / "saved"), channels=5)[1]
        expected = arrays[1].transpose(2, 0, 1) * 2 - 1
        assert np.abs(item["pixel_values"].numpy() - expected).max() < 1e-6


class TestHub:
    @pytest.fixture(autouse=True)
    def hub(self, table: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A hub with one data set, owner/pictures; records what is asked of it."""
        asked: list[Any] = []

        def split_names(name: str, config_name: str | None, revision: str | None) -> list[str]:
            if name != "owner/pictures":
                raise datasets.exceptions.DatasetNotFoundError(f"{name} doesn't exist on the Hub")
            return ["train", "test"]

        def load_dataset(name: str, subset: str | None, **options: Any) -> datasets.Dataset:
            asked.append((name, subset, options))
            return table.select(range(8) if options["split"] == "train" else range(8, 10))

        monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    @pytest.mark.parametrize("source", ["owner/pictures", "hub:owner/pictures"])
    def test_by_name(self, source: str, hub: list[Any]) -> None:
        dataset = load(source, subset="small", revision="v2")
        assert len(dataset) == 8
        assert hub == [
            ("owner/pictures", "small", {"split": "train", "revision": "v2", "streaming": False})
        ]
        assert load(source, split="test").captions == ["caption 8", "caption 9"]

    def test_a_holdout_comes_from_the_train_split(self) -> None:
        parts = [load("owner/pictures", holdout_fraction=0.4, split=s) for s in ("train", "test")]
        assert sorted(parts[0].captions + parts[1].captions) == [f"caption {n}" for n in range(8)]

    def test_a_name_that_is_not_there(self) -> None:
        with pytest.raises(DataError, match=r"owner/other: no such folder; .* doesn't exist"):
            load("owner/other")
        with pytest.raises(DataError, match="hub:owner/other: cannot be read"):
            load("hub:owner/other")
        with pytest.raises(DataError, match=r"pictures: no such folder .*hub:pictures"):
            load("pictures")


class TestWebdataset:
    @pytest.fixture
    def shards(self, tmp_path: Path, pixels: Pixels) -> Path:
        """Three shards of four images, with text, class and JSON beside each."""
        for shard in range(3):
            items = {}
            for number in range(4 * shard, 4 * shard + 4):
                items[f"{number:03d}.png"] = png(pixels())
                items[f"{number:03d}.txt"] = f"text {number}".encode()
                items[f"{number:03d}.cls"] = str(number % 2).encode()
                items[f"{number:03d}.json"] = json.dumps({"title": f"title {number}"}).encode()
            write_tar(tmp_path / f"shard-{shard:02d}.tar", items)
        return tmp_path

    @pytest.mark.parametrize(
        "source", ["webdataset:{}", "webdataset:{}/shard-{{00..02}}.tar", "{}/shard-0*.tar"]
    )
    def test_shards_are_streamed(self, shards: Path, source: str) -> None:
        dataset = load(source.format(shards), class_names=("even", "odd"))
        assert isinstance(dataset, StreamingImageDataset)
        items = list(dataset)
        assert sorted(item["name"] for item in items) == [f"{n:03d}" for n in range(12)]
        assert [item["index"] for item in items] == list(range(12))
        for item in items:
            number = int(item["name"])
            assert item["caption"] == f"text {number}"
            assert item["class_label"] == number % 2
            assert item["pixel_values"].shape == (3, 16, 16)
        assert dataset.has_captions
        assert dataset.class_names == ["even", "odd"]

    def test_a_caption_inside_json(self, shards: Path) -> None:
        dataset = load(f"webdataset:{shards}", caption_field="json.title")
        assert {item["caption"] for item in dataset} == {f"title {n}" for n in range(12)}
        with pytest.raises(DataError, match=r"caption_field='json\.name' is not a column"):
            load(f"webdataset:{shards}", caption_field="json.name")

    def test_holdout_by_name(self, shards: Path) -> None:
        def names(split: str) -> set[str]:
            dataset = load(f"webdataset:{shards}", holdout_fraction=0.3, split=split)
            return {item["name"] for item in dataset}

        assert names("train") | names("test") == {f"{n:03d}" for n in range(12)}
        assert not names("train") & names("test")
        assert names("test")
        with pytest.raises(DataError, match="holdout_fraction"):
            load(f"webdataset:{shards}", split="test")

    def test_16_bit_arrays(self, tmp_path: Path, rng: np.random.Generator) -> None:
        array = rng.integers(0, 65536, (16, 16, 2), dtype=np.uint16)
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_tar(tmp_path / "a.tar", {"0.npy": buffer.getvalue()})
        item = next(iter(load(str(tmp_path / "a.tar"), channels=2)))
        expected = array.transpose(2, 0, 1) / 32767.5 - 1
        assert np.abs(item["pixel_values"].numpy() - expected).max() < 1e-6

    def test_missing_and_damaged_shards(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such files"):
            load(str(tmp_path / "no.tar"))
        (tmp_path / "bad.tar").write_text("not a tar")
        with pytest.raises(DataError, match=r"bad\.tar: cannot be read"):
            load(str(tmp_path / "bad.tar"))


def test_ranges_of_shards() -> None:
    assert expand_range("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_range("{1..2}/{0..1}") == ["1/0", "1/1", "2/0", "2/1"]
    assert expand_range("a*.tar") == ["a*.tar"]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
