"""Exit statuses and messages of the command line itself."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from fastldm import __version__, cli
from fastldm.training.loop import Interrupted

Run = Callable[..., str]


def test_help_and_version(run: Run) -> None:
    shown = run("--help")
    assert all(command in shown for command in cli.COMMANDS)
    assert run("--version").strip() == f"fastldm {__version__}"


def test_every_command_has_its_module_and_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in cli.COMMANDS:
        if command == "env":
            continue
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"fastldm {command}" in shown
        if command == "train-autoencoder":
            assert "Peak learning rate." in shown
            assert "Height and width of the images given out" in shown
            assert "--strict: short for" in shown
        if command == "sample":
            assert "Steps of the sampler." in shown
            assert "--strict" not in shown


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_no_or_an_unknown_command(run: Run, arguments: list[str]) -> None:
    shown = run(*arguments, status=2)
    assert shown.count("\n") == 1
    assert "fastldm --help" in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.resolution", "large"], "data.resolution: expected an integer, got large"),
        (["--data.resolutoin", "32"], "data.resolutoin: there is no such option; did you mean "),
        (["--loss.kl_wieght", "1"], "did you mean loss.kl_weight?"),
        (["--colour", "1"], "colour: there is no such option"),
        (["--batch_size", "two"], "batch_size: expected an integer, got two"),
        (["--max_grad_norm", "big"], "max_grad_norm: expected a number or null, got big"),
        (["--adam_betas", "[a, b]"], "adam_betas: expected a number, got a"),
        (["--data.crop", "left"], "data.crop: expected one of center, random, pad, none, got left"),
        (["--data", "photos"], "data: expected fields with their values, got photos\n"),
        (["--max_steps"], "max_steps: expected one argument"),
        (["--batch_size", "0"], "batch_size: expected an integer of at least 1"),
        (["--config", "nowhere.yaml"], "config: File does not exist: "),
        (["--model.class_name", "os.system"], "model.class_name: expected one of AutoencoderKL"),
        (["--model.config.chanels", "3"], "no config field 'chanels'"),
        (["--model.config.latent_channels", "four"], "latent_channels: expected int, got 'four'"),
        (["--data.resolution", "15"], "data.resolution: 15 is not a multiple of f = 2"),
        (["--data.source", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    run: Run, images: Path, first_stage_yaml: Path, tmp_path: Path, options: list[str],
    expected: str,
) -> None:  # fmt: skip
    common = ["--output_dir", tmp_path / "out", "--data.source", images, "--data.resolution", 16]
    shown = run("train-autoencoder", "--config", first_stage_yaml, *common, *options, status=2)
    assert shown.count("\n") == 1, shown
    assert shown.startswith("fastldm train-autoencoder: error: ")
    assert expected in shown
    assert "class '" not in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.resolution", "large"], "data.resolution: expected an integer, got large\n"),
        (["--data.resoluton", "8"], "data.resoluton: there is no such option; did you mean data."),
        (["--data.crop", "left"], "data.crop: expected one of center, random, pad, none, got left"),
        (["--data.holdout_fraction", "2"], "error: holdout_fraction must be at least 0 and below"),
        (["--data", "photos"], "data: expected fields with their values, got photos\n"),
        (["--conditioner", "TextEncoder"], "conditioner: expected fields with their values"),
        (["--conditioner.class", "a"], "conditioner.class: there is no such option; did you mean "),
        (["--mixed_precision", "8"], "expected one of no, bf16, fp16 or null, got 8"),
    ],
)
def test_options_that_may_be_left_out_have_as_clear_errors(
    run: Run, images: Path, second_stage_yaml: Path, tmp_path: Path, options: list[str],
    expected: str,
) -> None:  # fmt: skip
    common = ["--output_dir", tmp_path, "--first_stage", tmp_path, "--data.source", images]
    shown = run("train-ldm", "--config", second_stage_yaml, *common, *options, status=2)
    assert shown.count("\n") == 1, shown
    assert expected in shown


def test_strict_stops_at_an_unreadable_image_and_otherwise_it_is_counted(
    run: Run, images: Path, first_stage_yaml: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "dark" / "00.png").write_bytes(b"no image")
    (folder / "light" / "01.png").write_bytes((folder / "light" / "03.png").read_bytes()[:-40])
    options = ["--output_dir", tmp_path / "out", "--data.source", folder, "--data.resolution", 16]
    command = ["train-autoencoder", "--config", first_stage_yaml, *options, "--max_steps", 3]
    shown = run(*command, "--strict", status=2)
    assert "unreadable image dark/00.png" in shown
    assert shown.count("\n") == 1, shown
    run(*command)
    assert (
        "dark/00.png: ValueError: not an image of a known format; skipped, 1 of 12" in caplog.text
    )
    assert "light/01.png" in caplog.text
    assert "2 unreadable images were skipped" in caplog.text


def test_a_missing_value_is_named(run: Run) -> None:
    shown = run("train-autoencoder", "--max_steps", 1, status=2)
    assert shown.count("\n") == 1
    assert "output_dir" in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size: two\n", "batch_size: expected an integer, got two"),
        ("batchsize: 2\n", "batchsize: there is no such option; did you mean batch_size?"),
        ("data: {souce: a}\n", "data.souce: there is no such option; did you mean data.source?"),
        ("model: [1, 2\n", "wrong.yaml: not YAML: "),
        ("", "wrong.yaml: expected options with their values"),
        ("- batch_size\n", "wrong.yaml: expected options with their values"),
    ],
)
def test_a_wrong_file_is_one_line(run: Run, tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    shown = run("train-autoencoder", "--config", path, "--output_dir", tmp_path, status=2)
    assert shown.count("\n") == 1, shown
    assert expected in shown


def test_an_interruption_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.cli import encode

    def interrupted(_: Any) -> None:
        raise Interrupted("interrupted at step 7; go on with resume: latest")

    monkeypatch.setattr(encode, "run", interrupted)
    assert "step 7; go on with resume: latest" in run("encode", status=130)


def test_a_missing_package_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.cli import encode

    def missing(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    monkeypatch.setattr(encode, "run", missing)
    shown = run("encode", status=2)
    assert "the package accelerate is not installed; pip install 'fastldm[train]'" in shown


def test_a_missing_module_of_ours_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.cli import encode

    def missing(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'fastldm.nothing'", name="fastldm.nothing")

    monkeypatch.setattr(encode, "run", missing)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["encode"])


def test_help_loads_neither_torch_nor_the_parser() -> None:
    code = (
        "import sys; from fastldm.cli import main; main(['--help']);"
        "assert not {'torch', 'jsonargparse', 'accelerate', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_log_lines_and_progress_bars_do_not_share_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = logging.LogRecord("a", logging.INFO, "b", 1, "step %d", (3,), None)
    with tqdm(total=2, file=sys.stderr, desc="bar") as bar:
        bar.update()
        cli.LogHandler().emit(record)
    lines = re.split("[\r\n]", capsys.readouterr().err)
    assert "step 3" in lines
    assert any(line.startswith("bar:") for line in lines)


def test_it_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastldm.cli", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.startswith("fastldm ")


def test_env_shows_versions_and_backends(run: Run) -> None:
    shown = run("env")
    assert "torch" in shown
    assert "group_norm_silu" in shown


def test_env_takes_no_options(run: Run) -> None:
    assert "no options" in run("env", "--all", status=2)
