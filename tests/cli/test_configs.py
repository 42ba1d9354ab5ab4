"""Every file under configs/ is read, and the paper's models have the paper's sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.cli import parsing
from fastldm.cli.parsing import find_config, parse_config
from fastldm.schedulers import DDIMScheduler
from fastldm.training import AutoencoderTrainingConfig, LatentDiffusionTrainingConfig
from fastldm.training.registry import (
    CONDITIONERS,
    DISCRIMINATORS,
    FIRST_STAGES,
    SCHEDULERS,
    UNETS,
    build,
)

CONFIGS = Path(__file__).parents[2] / "configs"

# Counted from the shapes in the published checkpoints.
FIRST_STAGE_PARAMETERS = {
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    "vq-f4": 55_322_782,
    "vq-f4-noattn": 53_219_486,
    "vq-f8": 67_717_295,
    "vq-f8-n256": 67_652_783,
    "vq-f16": 69_593_371,
}
UNET_PARAMETERS = {
    "celebahq-vq-f4": 274_056_163,
    "ffhq-vq-f4": 274_056_163,
    "bedrooms-vq-f4": 274_056_163,
    "churches-kl-f8": 294_966_916,
    "imagenet-vq-f8": 394_984_196,
    "imagenet-vq-f4": 400_920_579,
    "text2img-vq-f4": 403_623_939,
    "text2img-1p4b-kl-f8": 872_300_484,
    "layout2img-vq-f4": 246_277_379,
    "superresolution-vq-f4": 113_622_563,
    "inpainting-vq-f4": 387_245_827,
    "semantic-vq-f4": 215_229_315,
}


def names(folder: str) -> set[str]:
    return {path.stem for path in (CONFIGS / folder).glob("*.yaml")}


def read(kind: Any, name: str) -> Any:
    return parse_config(kind, ["--config", str(CONFIGS / f"{name}.yaml")], "test", "")


def size(model: Any, accepted: tuple[str, ...]) -> int:
    with torch.device("meta"):
        return build(model, accepted, "model").num_parameters()


def test_no_file_is_left_out() -> None:
    assert names("autoencoders") == set(FIRST_STAGE_PARAMETERS)
    assert names("ldm") == set(UNET_PARAMETERS)


@pytest.mark.parametrize(("name", "parameters"), FIRST_STAGE_PARAMETERS.items())
def test_first_stages(name: str, parameters: int) -> None:
    config = read(AutoencoderTrainingConfig, f"autoencoders/{name}")
    assert size(config.model, FIRST_STAGES) == parameters
    with torch.device("meta"):
        build(config.discriminator, DISCRIMINATORS, "discriminator")
        model = build(config.model, FIRST_STAGES, "model")
    assert f"f{model.downsampling_factor}" in name.split("-")
    assert config.loss.legacy == (config.model.class_name == "VQModel")


@pytest.mark.parametrize(("name", "parameters"), UNET_PARAMETERS.items())
def test_diffusion_models(name: str, parameters: int) -> None:
    config = read(LatentDiffusionTrainingConfig, f"ldm/{name}")
    assert size(config.unet, UNETS) == parameters
    assert isinstance(build(config.scheduler, SCHEDULERS, "scheduler"), DDIMScheduler)
    first_stage = Path(config.first_stage).parts[1]
    assert first_stage in FIRST_STAGE_PARAMETERS
    autoencoder = read(AutoencoderTrainingConfig, f"autoencoders/{first_stage}")
    channels = autoencoder.model.config["latent_channels"]
    assert config.unet.config["out_channels"] == channels
    assert (config.unet.config["in_channels"] > channels) == (config.conditioning == "concat")
    if config.conditioner is not None:
        width = config.conditioner.config["hidden_size"]
        assert config.unet.config["cross_attention_dim"] == width
        assert size(config.conditioner, CONDITIONERS) > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("demo/autoencoder", AutoencoderTrainingConfig),
        ("demo/ldm", LatentDiffusionTrainingConfig),
        ("examples/folder-kl", AutoencoderTrainingConfig),
        ("examples/folder-vq", AutoencoderTrainingConfig),
        ("examples/class-conditional", LatentDiffusionTrainingConfig),
        ("examples/text-conditional", LatentDiffusionTrainingConfig),
        ("examples/unconditional", LatentDiffusionTrainingConfig),
    ],
)
def test_demo_and_examples(name: str, kind: Any) -> None:
    config = read(kind, name)
    part = config.model if kind is AutoencoderTrainingConfig else config.unet
    assert size(part, FIRST_STAGES + UNETS) > 0


def test_our_files_are_found_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "configs/examples/folder-kl.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == str(CONFIGS.parent / name)
    assert find_config("examples/folder-kl.yaml") == "examples/folder-kl.yaml"
    options = ["--data.source", "photos", "--output_dir", "out"]
    for words in (["--config", name], [f"--config={name}"]):
        config = parse_config(
            AutoencoderTrainingConfig, [*words, *options], "train-autoencoder", ""
        )
        assert config.output_dir == "out"
        assert config.model.config["latent_channels"] == 4
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config(name) == name


def test_an_installation_brings_our_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip lays out a wheel: the package in one folder, its data in another."""
    name = "configs/examples/folder-kl.yaml"
    packages = tmp_path / "lib" / "site-packages"
    information = packages / "fastldm-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fastldm\nVersion: 0\n")
    (information / "RECORD").write_text(f"../../share/fastldm/{name},,\n")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(parsing, "__file__", str(packages / "fastldm" / "cli" / "parsing.py"))
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(name)).resolve() == tmp_path / "share" / "fastldm" / name
    assert find_config("configs/none.yaml") == "configs/none.yaml"
