"""Folders: what is in them, what comes back, and who else can read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastldm import LatentDiffusion
from fastldm.errors import CheckpointError, ConfigError
from fastldm.losses import DiffusionLossConfig

KINDS = ["none", "crossattn", "classes", "concat", "hybrid", "class"]


def draw(model: LatentDiffusion, build: Any, kind: str) -> torch.Tensor:
    name = {"crossattn": "captions", "class": "class_labels", "classes": "class_labels"}.get(
        kind, "conditioning"
    )
    guidance = {} if kind == "none" else {"guidance_scale": 2.0}
    return model.eval().sample(
        3, **{name: build.condition(kind)}, num_inference_steps=2, seeds=4, eta=0.5, **guidance
    )


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_draws_the_same_images_bit_for_bit(build, kind: str, tmp_path) -> None:
    dropout = 0.0 if kind == "none" else 0.25
    loss = DiffusionLossConfig(loss_type="l1", snr_gamma=5.0, learn_logvar=True)
    model = build.model(kind, conditioning_dropout=dropout, loss=loss)
    model.calibrate_scale(5 * torch.randn(3, 3, 4, 4), per_channel=kind == "crossattn")
    with torch.no_grad():
        model.objective.logvar.normal_()
    model.save_pretrained(tmp_path / "model")
    loaded = LatentDiffusion.from_pretrained(tmp_path / "model")
    assert torch.equal(draw(loaded, build, kind), draw(model, build, kind))
    assert not loaded.training
    assert loaded.latent_scale == model.latent_scale
    assert loaded.objective.config == loss
    assert torch.equal(loaded.objective.logvar, model.objective.logvar)
    for name in (
        "conditioning", "conditioning_dropout", "train_conditioner", "use_attention_mask",
        "max_caption_length",
    ):  # fmt: skip
        assert getattr(loaded, name) == getattr(model, name)
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("kind", "stage", "folders"),
    [
        ("none", "vq", {"vqvae", "unet", "scheduler"}),
        ("none", "kl", {"vae", "unet", "scheduler"}),
        ("crossattn", "kl", {"vae", "unet", "scheduler", "text_encoder", "tokenizer"}),
        ("classes", "vq", {"vqvae", "unet", "scheduler", "class_embedder"}),
    ],
)
def test_the_layout(build, kind: str, stage: str, folders: set[str], tmp_path) -> None:
    build.model(kind, first_stage=build.first_stage(stage)).save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == folders
    index = index_of(folder)
    assert {name for name in index if not name.startswith("_")} == folders
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_moving_averages_are_saved_in_place_of_the_trained_weights(build, tmp_path) -> None:
    model = build.model("crossattn")
    unet, conditioner = build.cross_unet(), build.text_encoder()
    model.save_pretrained(tmp_path / "ema", unet=unet, conditioner=conditioner)
    loaded = LatentDiffusion.from_pretrained(tmp_path / "ema")
    with model.using(unet=unet, conditioner=conditioner):
        expected = draw(model, build, "crossattn")
    assert torch.equal(draw(loaded, build, "crossattn"), expected)
    assert not torch.equal(expected, draw(model, build, "crossattn"))


def test_saving_again_replaces_the_model_and_keeps_other_files(build, tmp_path) -> None:
    folder = tmp_path / "model"
    build.model("crossattn").save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    (folder / "grids").mkdir()
    (folder / "grids" / "1.png").write_bytes(b"png")
    build.model("none", first_stage=build.first_stage("vq")).save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "grids", "vqvae", "unet", "scheduler", "model_index.json",
        "latent_diffusion.json",
    }  # fmt: skip
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "grids" / "1.png").read_bytes() == b"png"
    assert LatentDiffusion.from_pretrained(folder).conditioning == "none"


def test_a_failed_save_leaves_the_earlier_one(build, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "model"
    model = build.model()
    model.save_pretrained(folder)
    expected = draw(model, build, "none")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    other = build.model()
    monkeypatch.setattr(other.scheduler, "save_pretrained", full_disk, raising=False)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(draw(LatentDiffusion.from_pretrained(folder), build, "none"), expected)


def test_diffusers_reads_and_draws_unconditional_models(build, tmp_path) -> None:
    import diffusers

    model = build.model(first_stage=build.first_stage("vq"))
    model.calibrate_scale(3 * torch.randn(4, 3, 4, 4))
    model.save_pretrained(tmp_path)
    assert index_of(tmp_path)["_class_name"] == "LDMPipeline"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline(1, generator, num_inference_steps=5, output_type="np").images
    ours = model.eval().sample(1, seeds=3, num_inference_steps=5)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_folders_of_diffusers_are_read(build, tmp_path) -> None:
    """LDMPipeline's folders have no latent_diffusion.json."""
    import diffusers

    own = build.model(first_stage=build.first_stage("vq"))
    own.save_pretrained(tmp_path / "own")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "own")
    pipeline.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "latent_diffusion.json").exists()
    loaded = LatentDiffusion.from_pretrained(tmp_path / "theirs")
    assert torch.equal(draw(loaded, build, "none"), draw(own, build, "none"))


@pytest.fixture(scope="module")
def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 8,
    }
    return CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=2, eos_token_id=3, pad_token_id=0))


def clip_tokenizer(build: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    build.tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_stable_diffusion_folders_go_both_ways(build, clip, tmp_path) -> None:
    import diffusers

    tokenizer = clip_tokenizer(build, tmp_path / "tokenizer")
    model = build.model("crossattn", conditioner=clip, tokenizer=tokenizer).eval()
    model.calibrate_scale(3 * torch.randn(4, 3, 4, 4))
    model.save_pretrained(tmp_path / "ours")
    assert index_of(tmp_path / "ours")["_class_name"] == "StableDiffusionPipeline"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipeline) is diffusers.StableDiffusionPipeline
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        build.captions[:2],
        guidance_scale=3.0,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="np",
    ).images
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    pipeline.save_pretrained(tmp_path / "theirs")
    for given in (model, LatentDiffusion.from_pretrained(tmp_path / "theirs")):
        ours = given.sample(
            captions=build.captions[:2], guidance_scale=3.0, num_inference_steps=4, seeds=5
        )
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_text_encoders_of_transformers_come_back(build, clip, tmp_path) -> None:
    tokenizer = clip_tokenizer(build, tmp_path / "tokenizer")
    model = build.model("crossattn", conditioner=clip, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "model")
    assert index_of(tmp_path / "model")["text_encoder"] == ["transformers", "CLIPTextModel"]
    loaded = LatentDiffusion.from_pretrained(tmp_path / "model")
    assert type(loaded.conditioner) is type(clip)
    assert torch.equal(draw(loaded, build, "crossattn"), draw(model, build, "crossattn"))
    (tmp_path / "model" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="text_encoder"):
        LatentDiffusion.from_pretrained(tmp_path / "model")


def test_a_scheduler_of_diffusers_comes_back(build, tmp_path) -> None:
    import diffusers

    scheduler = diffusers.KDPM2DiscreteScheduler(beta_schedule="scaled_linear")
    model = build.model(scheduler=scheduler)
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.KDPM2DiscreteScheduler
    common: dict[str, Any] = {"num_inference_steps": 2, "seeds": 0}
    assert torch.equal(loaded.sample(1, **common), model.eval().sample(1, **common))


def test_parts_and_dtype_can_be_chosen(build, tmp_path) -> None:
    build.model("crossattn").save_pretrained(tmp_path)
    scheduler = build.scheduler(timestep_spacing="trailing")
    loaded = LatentDiffusion.from_pretrained(
        tmp_path, scheduler=scheduler, torch_dtype=torch.bfloat16
    )
    assert loaded.scheduler is scheduler
    dtypes = {part.dtype for part in (loaded.first_stage, loaded.unet, loaded.conditioner)}
    assert dtypes == {torch.bfloat16}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_folders_are_named(build, tmp_path) -> None:
    def fresh(name: str) -> Path:
        build.model("crossattn").save_pretrained(tmp_path / name)
        return tmp_path / name

    def refused(folder: Path, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            LatentDiffusion.from_pretrained(folder)

    refused(tmp_path / "nowhere" / "at" / "all", CheckpointError, "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, r"no model_index\.json")
    folder = fresh("unet")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, CheckpointError, "damaged")
    folder = fresh("index")
    edit(folder / "model_index.json", unet=["os", "system"])
    refused(folder, CheckpointError, "unet is a system of os, which fastldm cannot load")
    edit(folder / "model_index.json", unet=["transformers", "pipeline"])
    refused(folder, CheckpointError, "unet is a pipeline of transformers")
    edit(folder / "model_index.json", unet=["diffusers"])
    refused(folder, CheckpointError, r"unet: expected \[library, class\]")
    edit(folder / "model_index.json", unet=[None, None])
    refused(folder, CheckpointError, "its index names no unet")
    (folder / "model_index.json").write_text("[]")
    refused(folder, CheckpointError, "expected a JSON object, got list")
    folder = fresh("fields")
    edit(folder / "latent_diffusion.json", colour="blue")
    refused(folder, ConfigError, r"latent_diffusion\.json: .*colour")
    (folder / "latent_diffusion.json").write_text("3")
    refused(folder, CheckpointError, "expected a JSON object, got int")
    folder = fresh("widths")
    build.text_encoder(hidden_size=16).save_pretrained(folder / "text_encoder")
    refused(
        folder, ConfigError, "cross_attention_dim: the UNet's is 12, but TextEncoder gives .* 16"
    )
    folder = fresh("channels")
    build.first_stage(latent_channels=4).save_pretrained(folder / "vae")
    refused(folder, ConfigError, "out_channels: the UNet's are 3, but the first stage has 4")


def test_what_cannot_be_saved_is_named(build, tmp_path) -> None:
    model = build.model("concat", conditioner=nn.Conv2d(4, 2, 1), train_conditioner=True)
    with pytest.raises(ConfigError, match="conditioner: a Conv2d has no save_pretrained"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        build.model().save_pretrained(tmp_path / "file")
