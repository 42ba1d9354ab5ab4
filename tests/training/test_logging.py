"""metrics.jsonl, means and the progress bar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastldm.training.logging import MeanOfLogs, MetricsLogger, ProgressBar, format_seconds


def test_lines_and_values_that_json_has_not(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 0, tensorboard=False)
    logger.log(1, {"a": 1.5, "b": float("nan")})
    logger.image(1, "grid", None)
    logger.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "a": 1.5, "b": "nan"}


def test_a_restart_drops_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "cut')
    logger = MetricsLogger(tmp_path, 2, tensorboard=False)
    logger.log(3, {"a": 2.0})
    logger.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "a": 2.0}]


def test_means_count_each_name_by_itself() -> None:
    means = MeanOfLogs(torch.device("cpu"))
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    means.add({"a": torch.tensor(2.0)})
    assert {name: value.item() for name, value in means.means().items()} == {"a": 1.5, "b": 5.0}
    assert means.take(lambda values: values * 2) == {"a": 3.0, "b": 10.0}
    assert means.take(lambda values: values) == {}


def test_the_bar_shows_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("stage", enabled=True)
    bar.update(0.5, "step 3 · 01:00 left")
    bar.close()
    shown = capsys.readouterr().err
    assert "stage" in shown
    assert "50%" in shown
    assert "step 3 · 01:00 left" in shown
    ProgressBar("quiet", enabled=False).close()
    assert capsys.readouterr().err == ""


def test_format_seconds() -> None:
    assert [format_seconds(value) for value in (None, 59.6, 61, 3661)] == [
        "?", "01:00", "01:01", "1:01:01",
    ]  # fmt: skip
