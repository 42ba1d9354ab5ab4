"""A whole study, what it writes, and how it goes on."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.errors import ConfigError, DataError
from fastldm.study import StudyConfig, run_study
from fastldm.study import run as study_run

from .conftest import MakeStudy


@pytest.fixture(scope="module")
def finished(make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    config = make_study(tmp_path_factory.mktemp("study") / "out")
    assert run_study(config) == Path(config.output_dir, "report.md")
    return config


def results(config: StudyConfig) -> Any:
    return json.loads(Path(config.output_dir, "study.json").read_text())


def test_every_cell_uses_its_budget_and_no_more(finished: StudyConfig) -> None:
    cells = {cell["name"]: cell for cell in results(finished)["cells"]}
    assert list(cells) == ["pixel", "kl-f2", "vq-f2"]
    assert finished.budget_tflop is not None
    for cell in cells.values():
        costs, stage, last = cell["costs"], cell["first_stage"], cell["curve"][-1]
        assert stage["tflop"] == pytest.approx(stage["steps"] * costs["first_stage_step"] / 1e12)
        encoding = costs["encoding"] / 1e12
        assert last["tflop"] == pytest.approx(
            last["steps"] * costs["diffusion_step"] / 1e12 + encoding
        )
        one_step = (costs["first_stage_step"] + costs["diffusion_step"]) / 1e12
        spent = stage["tflop"] + last["tflop"]
        assert finished.budget_tflop - one_step < spent <= finished.budget_tflop
        assert [point["steps"] for point in cell["curve"]] == [last["steps"] // 2, last["steps"]]
    assert cells["pixel"]["first_stage"]["steps"] == 0
    assert cells["pixel"]["costs"]["latent_shape"] == [3, 16, 16]
    assert cells["kl-f2"]["costs"]["latent_shape"] == [2, 8, 8]
    assert "codebook_usage" in cells["vq-f2"]["first_stage"]
    # Pixels cost more a step, and so have fewer of them for the same budget.
    assert cells["pixel"]["costs"]["denoising"] > 0
    assert cells["kl-f2"]["first_stage"]["images"] == results(finished)["images"]["held_out"]


def test_figures_are_finite_and_rates_rise(finished: StudyConfig) -> None:
    found = results(finished)
    for cell in found["cells"]:
        bound = cell["rate_distortion"]
        assert bound["bound"] == pytest.approx(bound["prior"] + bound["steps"] + bound["decoder"])
        assert bound["rate"] == sorted(bound["rate"])
        assert all(math.isfinite(point["distance"]) for point in cell["curve"])
        assert 0 < min(bound["distortion"]) <= max(bound["distortion"]) < 255
    pixel = found["cells"][0]["rate_distortion"]
    # For pixels the last rate and L_0 make the bound; rates are of the image there, too.
    assert pixel["rate"][-1] + pixel["decoder"] == pytest.approx(pixel["bound"])
    latent = found["cells"][1]["rate_distortion"]
    share = 2 * 8 * 8 / (3 * 16 * 16)
    assert latent["rate"][-1] == pytest.approx((latent["bound"] - latent["decoder"]) * share)


def test_what_is_written(finished: StudyConfig) -> None:
    folder = Path(finished.output_dir)
    report = (folder / "report.md").read_text()
    for plot in ("study_reconstruction", "study_samples", "study_rate_distortion"):
        assert f"]({plot}.png)" in report
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{plot}.svg").read_text()
    assert "](study_pictures.png)" in report
    assert (folder / "study_pictures.png").is_file()
    assert "LPIPS was not measured" in report or "LPIPS (alex)" in report
    assert "feature distance (random convolutions)" in report
    assert "It is no FID" in report
    with (folder / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["pixel", "kl-f2", "vq-f2"]
    assert rows[0]["bits_per_dim"]
    assert not rows[1]["bits_per_dim"]
    with (folder / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    pca = results(finished)["pca"]
    assert [(entry["f"], entry["numbers"]) for entry in pca] == [(2, 128)]
    assert pca[0]["components"] == results(finished)["images"]["reference"] - 1
    for cell in ("kl-f2", "vq-f2"):
        assert (folder / "cells" / cell / "reconstructions.png").is_file()
        assert (folder / "cells" / cell / "samples.png").is_file()


def test_a_finished_study_trains_nothing_again(
    finished: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(finished)
    for name in ("train_autoencoder", "train_latent_diffusion", "measure_bound", "draw_samples"):
        monkeypatch.delattr(study_run, name)
    run_study(finished)
    assert results(finished)["cells"] == before["cells"]


def test_an_interrupted_study_goes_on(
    make_study: MakeStudy, finished: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_study(tmp_path / "out", pixel=False, vq=[])
    draw, calls = study_run.draw_samples, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(study_run, "draw_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(config)
    monkeypatch.delattr(study_run, "train_autoencoder")
    run_study(config)
    assert len(calls) == 3
    (cell,) = results(config)["cells"]
    whole = results(finished)["cells"][1]
    for point, expected in zip(cell["curve"], whole["curve"], strict=True):
        assert point["distance"] == expected["distance"]
    assert cell["rate_distortion"] == whole["rate_distortion"]


def test_another_study_in_the_folder(
    make_study: MakeStudy, finished: StudyConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="holds a study with another points, seed; choose"):
        run_study(make_study(Path(finished.output_dir), points=3, seed=1))


def test_overwrite_deletes_nothing_before_the_new_study_is_found_to_serve(
    make_study: MakeStudy, finished: StudyConfig
) -> None:
    config = make_study(Path(finished.output_dir), overwrite=True, budget_tflop=1e-5)
    with pytest.raises(ConfigError, match="too small"):
        run_study(config)
    assert Path(finished.output_dir, "cells", "pixel", "cell.json").is_file()


def test_minutes(make_study: MakeStudy, tmp_path: Path) -> None:
    config = make_study(
        tmp_path, budget_tflop=None, budget_minutes=0.02, kl=[], pixel=False, points=1
    )
    run_study(config)
    (cell,) = results(config)["cells"]
    assert cell["first_stage"]["steps"] >= 1
    assert cell["curve"][-1]["steps"] >= 1
    assert "0.02 minutes of training" in Path(config.output_dir, "report.md").read_text()


def test_a_budget_that_is_too_small_says_what_is_needed(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    config = make_study(tmp_path, budget_tflop=1e-5)
    with pytest.raises(
        ConfigError, match=r"budget_tflop: 1e-05 is too small for pixel.* needs"
    ) as e:
        run_study(config)
    needed = float(str(e.value).split()[-1])
    with pytest.raises(ConfigError, match="too small for kl-f2"):
        run_study(make_study(tmp_path, budget_tflop=needed * 1.01))
    assert not (tmp_path / "cells").exists()


def test_empty_data(make_study: MakeStudy, tmp_path: Path) -> None:
    from fastldm.data import DataConfig

    empty = tmp_path / "empty"
    empty.mkdir()
    config = make_study(tmp_path / "out", data=DataConfig(str(empty), resolution=16))
    with pytest.raises(DataError, match="empty"):
        run_study(config)


def test_no_state_of_torch_is_left_behind(finished: StudyConfig) -> None:
    assert torch.is_grad_enabled()
