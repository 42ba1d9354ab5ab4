"""A whole profile: what it measures, what it keeps, and how it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.profiling import FAMILIES, runner
from fastldm.profiling.config import ProfileConfig
from fastldm.profiling.runner import Profile
from tests.profiling.conftest import small

Report = dict[str, Any]


def test_each_model_is_counted_and_measured(profiled: tuple[Report, Path]) -> None:
    report, folder = profiled
    assert json.loads((folder / "profile.json").read_text()) == report
    assert [cell["name"] for cell in report["cells"]] == ["f=1 pixels", "f=4 KL", "f=4 VQ"]
    for cell in report["cells"]:
        assert not cell["is_papers"]
        for task in ("sample", "train"):
            found = cell["measured"][task]
            assert found["batch_1"]["batch_size"] == 1
            assert 1 <= found["largest"]["batch_size"] <= 2
            assert found["largest"]["limited_by"]
            for reached in (found["batch_1"], found["largest"]):
                assert reached["images_per_second"] > 0
                assert reached["share_of_matrix_rate"] > 0
                assert reached["peak_bytes"] > 4 * cell["cost"]["parameters"]
            for times in found["families"].values():
                assert set(times["seconds_by_family"]) == set(FAMILIES)
                assert sum(times["seconds_by_family"].values()) == pytest.approx(
                    times["seconds"], rel=0.03
                )
        batch = cell["measured"]["sample"]["batch_1"]
        seconds = 5 * batch["seconds_of_step"] + batch["seconds_of_decode"]
        assert batch["images_per_second"] == pytest.approx(1 / seconds)
        assert (batch["seconds_of_decode"] == 0) == (cell["f"] == 1)
    decoding = {
        cell["name"]: cell["measured"]["sample"].get("decode_families") for cell in report["cells"]
    }
    assert decoding["f=1 pixels"] is None
    assert decoding["f=4 KL"]["seconds_by_family"]["lookup"] == 0
    assert decoding["f=4 VQ"]["seconds_by_family"]["lookup"] > 0


def test_the_ratio_has_its_spread(profiled: tuple[Report, Path]) -> None:
    ratio = profiled[0]["ratio"]
    assert (ratio["pixels"], ratio["latents"]) == ("f=1 pixels", "f=4 KL")
    for name in ("sample", "train", "train_from_image"):
        assert len(ratio[name]) == 5
        assert min(ratio[name]) > 0


@pytest.mark.usefixtures("quick_counts")
def test_what_is_there_is_not_measured_again(
    profiled: tuple[Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, original = profiled
    folder = tmp_path / "profile"
    shutil.copytree(original, folder)

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    for name in ("measure", "measure_ratio", "measure_roofs"):
        monkeypatch.setattr(runner, name, refuse)
    again = Profile(small(folder)).run()
    assert again["cells"] == report["cells"]
    assert again["ratio"] == report["ratio"]
    with pytest.raises(AssertionError, match="measured again"):
        Profile(small(folder, steps=6)).run()
    with pytest.raises(AssertionError, match="measured again"):
        Profile(small(folder, overwrite=True)).run()


@pytest.mark.usefixtures("quick_counts")
def test_interrupted_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(spec: Any, *_: Any) -> dict[str, Any]:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(spec.name)
        return {"sample": {"not_measured": "pretended"}, "train": {}}

    monkeypatch.setattr(runner, "measure", measure)
    config = small(tmp_path, regularizations=["kl"])
    monkeypatch.setattr(runner, "measure_ratio", lambda *_: None)
    with pytest.raises(KeyboardInterrupt, match="interrupted; what has ended is kept in"):
        Profile(config).run()
    assert not (tmp_path / "profile.json").exists()
    first, measured[:] = list(measured), []
    report = Profile(config).run()
    assert {*first, *measured} == {cell["name"] for cell in report["cells"]}
    assert len(measured) == 1


@pytest.mark.usefixtures("quick_counts")
def test_too_large_for_memory_is_said_with_the_figure(tmp_path: Path) -> None:
    report = Profile(small(tmp_path, memory_gb=0.001, f=[4], regularizations=["vq"])).run()
    reason = report["cells"][0]["measured"]["train"]["not_measured"]
    assert reason.startswith("f=4 VQ, to train at batch 1, needs about 0.")
    assert reason.endswith("0.00 GB are free")
    assert reason in (tmp_path / "profile.txt").read_text()


@pytest.mark.usefixtures("quick_counts")
def test_without_time_it_still_counts(tmp_path: Path) -> None:
    report = Profile(small(tmp_path, max_minutes=1e-6)).run()
    for cell in report["cells"]:
        assert "are left of max_minutes" in cell["measured"]["not_measured"]
        assert cell["cost"]["step"]["flops"] > 0
    assert "are left of max_minutes" in report["ratio"]["not_measured"]
    counted = Profile(small(tmp_path, measure=False)).run()
    assert counted["roofs"] is None
    assert counted["cells"][0]["measured"] == {"not_measured": "measure: false"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f": [4, 3]}, "f: got 3; accepted: 1, 2, 4, 8, 16, 32"),
        ({"f": []}, "f: expected at least one"),
        ({"regularizations": ["gan"]}, "regularizations: got 'gan'; accepted: kl, vq"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"max_minutes": 0.0}, "max_minutes: expected a positive number"),
        ({"image_size": 96}, "image_size: got 96 for f = 16; accepted: multiples of 64"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProfileConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_where_one_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        Profile(small(tmp_path, device="cuda"))
