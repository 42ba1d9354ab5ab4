"""Both stages from images to images, by the commands a user types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import fastldm.metrics

Run = Callable[..., str]

TEXT = (
    "--conditioning", "crossattn", "--conditioner.class_name", "TextEncoder",
    "--conditioner.config",
    "{hidden_size: 8, num_layers: 1, num_heads: 2, head_dim: 4, max_length: 8}",
    "--unet.config.cross_attention_dim", 8, "--tokenizer.vocab_size", 30,
)  # fmt: skip
CLASSES = (
    "--conditioning", "class", "--conditioner.class_name", "ClassEmbedder",
    "--conditioner.config.hidden_size", 8,
)  # fmt: skip
VQ = (
    "--model.class_name", "VQModel", "--model.config.num_vq_embeddings", 8,
    "--model.config.scaling_factor", 1.0,
)  # fmt: skip


@pytest.fixture
def data(images: Path) -> tuple[object, ...]:
    return (
        "--data.source", images, "--data.resolution", 16, "--data.holdout_fraction", 0.3,
        "--data.class_field", "folder",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_from_images_to_images(
    run: Run, data: tuple[object, ...], first_stage_yaml: Path, second_stage_yaml: Path,
    tmp_path: Path, kind: str,
) -> None:  # fmt: skip
    options = VQ if kind == "vq" else ()
    first = tmp_path / "first"
    shown = run(
        "train-autoencoder", "--config", first_stage_yaml, "--output_dir", first, *data, *options
    )
    model = Path(shown.strip())
    assert model == first / "final"
    used = yaml.safe_load((model / "config.yaml").read_text())
    assert used["data"]["resolution"] == 16
    # The configuration that was saved trains the same model again.
    run("train-autoencoder", "--config", model / "config.yaml", "--output_dir", tmp_path / "again")

    cache = tmp_path / "latents"
    run("encode", "--first_stage", model, *data, "--output_dir", cache, "--flips", "true",
        "--cpu", "true")  # fmt: skip
    condition = CLASSES if kind == "vq" else TEXT
    second = run(
        "train-ldm", "--config", second_stage_yaml, "--first_stage", model, *data, *condition,
        "--latent_cache", cache, "--output_dir", tmp_path / "second",
    ).strip()  # fmt: skip

    wanted = ("--classes", '["light", 0]') if kind == "vq" else ("--captions", "a dark square")
    samples = tmp_path / "samples"
    other = ("--captions", "a") if kind == "vq" else ("--classes", 0)
    needed = "classes" if kind == "vq" else "captions"
    for options in ((), other):
        shown = run("sample", "--model", second, *options, "--output_dir", samples, status=2)
        assert f"{needed}: {second} is conditioned on them; give some" in shown
    if kind == "vq":
        for unknown in ("blue", 2):
            shown = run("sample", "--model", second, "--classes", unknown, status=2)
            assert f"classes: no class {unknown!r}; names: dark, light" in shown
    run("sample", "--model", second, *wanted, "--num_images", 2, "--num_inference_steps", 2,
        "--guidance_scale", 1.5, "--scheduler", "ddpm", "--batch_size", 3,
        "--output_dir", samples, "--cpu", "true")  # fmt: skip
    lines = [json.loads(line) for line in (samples / "samples.jsonl").read_text().splitlines()]
    if kind == "vq":
        assert [line["caption"] for line in lines] == ["light", "light", "dark", "dark"]
    else:
        assert [line["caption"] for line in lines] == ["a dark square"] * 2
    assert [line["seed"] for line in lines] == list(range(len(lines)))
    for line in lines:
        assert Image.open(samples / line["file_name"]).size == (16, 16)
    assert (samples / "grid.png").is_file()

    shown = run("reconstruct", "--model", second, *data, "--split", "test", "--num_images", 2,
                "--output_dir", tmp_path / "recon", "--cpu", "true")  # fmt: skip
    assert "2 images, PSNR" in shown
    assert len(list((tmp_path / "recon").glob("0*.png"))) == 2

    report = tmp_path / "report.json"
    figures = json.loads(run("evaluate", "--model", model, *data, "--num_images", 3,
                             "--batch_size", 2, "--output", report, "--cpu", "true"))  # fmt: skip
    assert figures == json.loads(report.read_text())
    assert figures["images"] == 3
    assert figures["psnr"] > 0
    assert ("codebook_usage" in figures) == (kind == "vq")


def test_an_unconditional_model_samples(
    run: Run, data: tuple[object, ...], first_stage_yaml: Path, second_stage_yaml: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = run(
        "train-autoencoder", "--config", first_stage_yaml, "--output_dir", tmp_path / "a", *data
    ).strip()
    second = run(
        "train-ldm", "--config", second_stage_yaml, "--first_stage", model, *data,
        "--output_dir", tmp_path / "b", "--conditioning_dropout", 0, "--unet",
        "{class_name: UNet2DModel, config: {block_out_channels: [8, 8], norm_num_groups: 4, "
        "layers_per_block: 1, down_block_types: [DownBlock2D, DownBlock2D], "
        "up_block_types: [UpBlock2D, UpBlock2D], add_attention: false}}",
    ).strip()  # fmt: skip
    samples = tmp_path / "samples"
    run("sample", "--model", second, "--num_images", 3, "--num_inference_steps", 2,
        "--resolution", 32, "--output_dir", samples, "--cpu", "true")  # fmt: skip
    assert Image.open(samples / "00002.png").size == (32, 32)
    shown = run("sample", "--model", second, "--classes", 1, "--output_dir", samples, status=2)
    assert f"classes: given, but {second} is unconditional" in shown
    shown = run("evaluate", "--model", model, *data, "--fid_samples", 4, "--inception_weights",
                tmp_path / "none.pth", status=2)  # fmt: skip
    assert "holds only a first stage" in shown


def test_wrong_samples_are_refused(run: Run, tmp_path: Path) -> None:
    shown = run("sample", "--model", tmp_path, "--captions", "a", "--classes", "1", status=2)
    assert "captions, classes: give one of them" in shown
    shown = run("sample", "--model", tmp_path, "--num_images", 0, status=2)
    assert "num_images: expected at least 1" in shown
    assert "no model_index.json" in run("sample", "--model", tmp_path, status=2)


def test_a_stale_cache_is_one_line(
    run: Run, data: tuple[object, ...], first_stage_yaml: Path, second_stage_yaml: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    models = [
        run("train-autoencoder", "--config", first_stage_yaml, "--output_dir", tmp_path / str(seed),
            "--seed", seed, *data).strip()
        for seed in (1, 2)
    ]  # fmt: skip
    cache = tmp_path / "latents"
    run("encode", "--first_stage", models[0], *data, "--output_dir", cache, "--cpu", "true")
    shown = run(
        "train-ldm", "--config", second_stage_yaml, "--first_stage", models[1], *data, *CLASSES,
        "--latent_cache", cache, "--output_dir", tmp_path / "second", status=2,
    )  # fmt: skip
    assert "stale latent cache" in shown
    assert shown.count("\n") == 1


class CountingDistance:
    """In place of the FID, whose Inception weights are not at hand: counts what it is given."""

    def __init__(self, weights: object, **_: object) -> None:
        self.counts = [0, 0]

    def update_reference(self, images: Any) -> None:
        self.counts[0] += len(images)

    def update(self, images: Any) -> None:
        assert images.min() >= -1
        assert images.max() <= 1
        self.counts[1] += len(images)

    def compute(self) -> float:
        return self.counts[0] + self.counts[1] / 100


def test_fid_is_of_as_many_samples_as_asked_for(
    run: Run, data: tuple[object, ...], first_stage_yaml: Path, second_stage_yaml: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("fastldm.metrics.fid.FrechetInceptionDistance", CountingDistance)
    monkeypatch.delitem(vars(fastldm.metrics), "FrechetInceptionDistance", raising=False)
    model = run(
        "train-autoencoder", "--config", first_stage_yaml, "--output_dir", tmp_path / "a", *data
    ).strip()
    second = run(
        "train-ldm", "--config", second_stage_yaml, "--first_stage", model, *data, *CLASSES,
        "--output_dir", tmp_path / "b",
    ).strip()  # fmt: skip
    figures = json.loads(
        run("evaluate", "--model", second, *data, "--split", "train", "--num_images", 5, "--rfid",
            "true", "--fid_samples", 7, "--num_inference_steps", 2, "--batch_size", 2,
            "--cpu", "true")
    )  # fmt: skip
    assert figures["rfid"] == pytest.approx(5.05)
    assert figures["fid"] == pytest.approx(5.07)
