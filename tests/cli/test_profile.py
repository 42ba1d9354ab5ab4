"""`fastldm profile`: options, output, and wrong input as one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Run = Callable[..., str]


def test_quick_may_stand_alone(run: Run, tmp_path: Path) -> None:
    options = ("--f", "[32]", "--regularizations", "[kl]", "--image_size", 128)
    common = (*options, "--measure", "false", "--progress_bar", "false", "--output_dir", tmp_path)
    shown = run("profile", "--quick", *common)
    assert "f=32 KL" in shown
    assert "not measured: measure: false" in shown
    assert f"written to {tmp_path}" in shown
    settings = json.loads((tmp_path / "profile.json").read_text())["settings"]
    assert settings["quick"]
    assert settings["base_channels"] == 32
    assert (tmp_path / "costs.svg").is_file()
    assert not (tmp_path / "throughput.svg").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--f", "[4,5]"], "f: got 5; accepted: 1, 2, 4, 8, 16, 32"),
        (["--regularizations", "[gan]"], "regularizations: got 'gan'; accepted: kl, vq"),
        (["--device", "warp"], "device: got 'warp'"),
        (["--quick", "--step", "3"], "step: there is no such option; did you mean steps?"),
        (["--quick", "perhaps"], "perhaps"),
    ],
)
def test_wrong_input_is_one_line(run: Run, options: list[str], expected: str) -> None:
    shown = run("profile", *options, status=2)
    assert shown.count("\n") == 1
    assert shown.startswith("fastldm profile: error: ")
    assert expected in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_where_one_is_asked_for(run: Run) -> None:
    shown = run("profile", "--device", "cuda", status=2)
    assert shown == ("fastldm profile: error: device: got 'cuda', but torch finds no GPU here\n")
