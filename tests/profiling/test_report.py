"""The report's files: numbers as they were measured, quoted ones beside and never among them."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastldm.profiling import paper
from fastldm.profiling.plots import PLOTS
from fastldm.profiling.report import text
from fastldm.profiling.tables import comparison_table, main_table, notes

Profiled = tuple[dict[str, Any], Path]


def test_csv_holds_what_json_holds(profiled: Profiled) -> None:
    report, folder = profiled
    with (folder / "profile.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == len(report["cells"])
    for record, cell in zip(records, report["cells"], strict=True):
        assert int(record["parameters"]) == cell["cost"]["parameters"]
        assert int(record["sample_flops"]) == cell["cost"]["sample"]["flops"]
        rate = cell["measured"]["train"]["batch_1"]["images_per_second"]
        assert float(record["train_batch_1_images_per_second"]) == rate
        assert record["device"] == report["stamp"]["device"]


def test_each_plot_is_a_picture_and_a_drawing(profiled: Profiled) -> None:
    _, folder = profiled
    for name in PLOTS:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 900
            assert len(image.convert("RGB").getcolors(2**20)) > 20
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")


def test_the_text_says_device_ratio_and_quotes(profiled: Profiled) -> None:
    report, folder = profiled
    shown = text(report)
    assert shown == (folder / "profile.txt").read_text()
    assert f"Measured on {report['stamp']['device']}" in shown
    assert "f=4 KL against f=1 pixels at the same image size, median (range) of 5 rounds" in shown
    assert f"Quoted from Table 6 ({paper.SOURCE}, {paper.DEVICE}" in shown


def test_ours_stands_beside_a_quote_only_for_the_same_model(profiled: Profiled) -> None:
    report = copy.deepcopy(profiled[0])
    narrow = comparison_table(report)
    assert {row[3] for row in narrow[1:]} == {"–"}
    assert "measured narrower than the paper's" in {row[4] for row in narrow[1:]}
    for cell in report["cells"]:
        cell["is_papers"] = True
    table = {row[0]: row for row in comparison_table(report)[1:]}
    largest = report["cells"][2]["measured"]["sample"]["largest"]
    seconds = 500 * largest["seconds_of_step"] + largest["seconds_of_decode"]
    _, steps, quoted, ours, where = table["LDM-4, CelebA-HQ"]
    assert (steps, quoted) == ("500", "0.43/s")
    assert float(ours.removesuffix("/s")) == pytest.approx(
        largest["batch_size"] / seconds, rel=0.01
    )
    assert where == f"{report['stamp']['device']}, batch {largest['batch_size']}"
    assert table["LDM-8, ImageNet"][3] == "–"
    assert table["ADM, ImageNet (pixels)"][3] == "–"


def test_printed_parameters_stand_beside_counted_ones(profiled: Profiled) -> None:
    report = copy.deepcopy(profiled[0])
    cell = report["cells"][2]
    cell["is_papers"] = True
    cell["cost"]["parameters"] = 274_056_163
    row = main_table(report)[3]
    assert row[2:4] == ["274.1M", "274M"]


def test_missing_figures_are_explained(profiled: Profiled) -> None:
    report = copy.deepcopy(profiled[0])
    report["cells"][0]["measured"] = {"sample": {"not_measured": "too large"}, "train": {}}
    report["ratio"] = {"not_measured": "too slow"}
    assert "f=1 pixels: not measured: too large" in notes(report)
    assert "Latents against pixels: not measured: too slow" in notes(report)
    assert main_table(report)[1][9] == "–"


def test_the_quoted_tables_are_complete() -> None:
    assert [row.f for row in paper.TABLE_13] == [row.f for row in paper.TABLE_14]
    assert len(paper.TABLE_8) == 11
    assert paper.first_stage_row("vq", 8).rfid == 1.14
    assert paper.first_stage_row("kl", 32).latent_channels == 64
