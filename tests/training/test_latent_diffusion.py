"""The latent diffusion trainer: resume, accumulation, caches, every kind of condition it trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm import LatentDiffusion
from fastldm.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from fastldm.storage import load_weights
from fastldm.training import (
    LatentDiffusionTrainingConfig,
    ModelConfig,
    encode_dataset,
    train_latent_diffusion,
)
from fastldm.training.latent_diffusion import LatentDiffusionTrainer
from fastldm.training.registry import load_first_stage

Make = Callable[..., LatentDiffusionTrainingConfig]
Metrics = Callable[[str | Path], list[dict[str, Any]]]


def weights(config: LatentDiffusionTrainingConfig, step: int, name: str) -> dict[str, Any]:
    return load_weights(Path(config.output_dir, f"checkpoint-{step}", f"{name}.safetensors"))


@pytest.mark.parametrize("conditioning", ["none", "crossattn", "class"])
def test_a_model_trains_saves_and_samples(
    diffusion_config: Make, metrics: Metrics, conditioning: str
) -> None:
    config = diffusion_config(conditioning=conditioning, sample_every=2, validate_every=2)
    final = train_latent_diffusion(config)
    model = LatentDiffusion.from_pretrained(final)
    cond = {"none": None, "crossattn": ["a small red disc"], "class": torch.tensor([1])}
    guidance = 1.0 if conditioning == "none" else 2.0
    images = model.sample(
        1, conditioning=cond[conditioning], num_inference_steps=2, guidance_scale=guidance, seeds=0
    )
    assert images.shape == (1, 3, 16, 16)
    lines = metrics(config.output_dir)
    assert [line["step"] for line in lines if "val_loss_ema" in line] == [2, 3]
    assert len(list(Path(config.output_dir, "samples").iterdir())) == 2
    if conditioning == "class":
        assert json.loads((final / "class_names.json").read_text()) == ["blue", "green", "red"]
    averaged = weights(config, 3, "ema")
    for name, value in model.unet.state_dict().items():
        assert torch.equal(value, averaged[f"module.unet.{name}"]), name


def test_resume_is_bit_for_bit(diffusion_config: Make, tmp_path: Path) -> None:
    common = {
        "conditioning": "crossattn",
        "latent_cache": str(tmp_path / "latents"),
        "cache_flips": True,
        "scaling": "per_channel",
        "lr_schedule": "linear",
        "checkpoint_every": 5,
    }
    whole = diffusion_config("whole", max_steps=10, **common)
    train_latent_diffusion(whole)
    # From the same run: two trainings of a vocabulary break ties by chance.
    middle = Path(whole.output_dir, "checkpoint-5")
    half = diffusion_config("half", max_steps=10, resume=str(middle), **common)
    train_latent_diffusion(half)
    for name in ("model", "ema"):
        one, two = weights(whole, 10, name), weights(half, 10, name)
        assert all(torch.equal(value, two[key]) for key, value in one.items()), name
    scales = [
        json.loads(Path(config.output_dir, "checkpoint-10", "latent_scale.json").read_text())
        for config in (whole, half)
    ]
    assert scales[0] == scales[1]


def test_accumulation_is_one_large_batch(diffusion_config: Make, metrics: Metrics) -> None:
    common = {"conditioning": "class", "adam_eps": 1.0, "learning_rate": 1.0, "max_steps": 2}
    large = diffusion_config("large", batch_size=4, **common)
    small = diffusion_config("small", batch_size=1, gradient_accumulation_steps=4, **common)
    train_latent_diffusion(large)
    train_latent_diffusion(small)
    for one, two in zip(metrics(large.output_dir)[:2], metrics(small.output_dir)[:2], strict=True):
        for name in ("loss", "grad_norm_unet"):
            assert one[name] == pytest.approx(two[name], rel=1e-4), name
    other = weights(small, 2, "model")
    for name, value in weights(large, 2, "model").items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_cached_latents_train_as_images_do(diffusion_config: Make, tmp_path: Path) -> None:
    cached = diffusion_config("cached", latent_cache=str(tmp_path / "latents"))
    direct = diffusion_config("direct")
    train_latent_diffusion(cached)
    train_latent_diffusion(direct)
    other = weights(direct, 3, "model")
    for name, value in weights(cached, 3, "model").items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_loss_on_fixed_noise_falls(
    diffusion_config: Make, metrics: Metrics, tmp_path: Path
) -> None:
    config = diffusion_config(
        max_steps=250,
        validate_every=125,
        latent_cache=str(tmp_path / "latents"),
        learning_rate=5e-3,
        validation_images=6,
    )
    train_latent_diffusion(config)
    values = [line["val_loss"] for line in metrics(config.output_dir) if "val_loss" in line]
    # Predicting no noise at all has a loss of 1.
    assert values[-1] < values[0] < 0.9
    assert values[-1] < 0.65


def test_the_first_batch_sets_the_scale(diffusion_config: Make) -> None:
    config = diffusion_config(batch_size=8)
    train_latent_diffusion(config)
    scale = json.loads(Path(config.output_dir, "checkpoint-3", "latent_scale.json").read_text())
    from fastldm.training.environment import Environment

    trainer = LatentDiffusionTrainer(config, Environment(config))
    batch = next(trainer.batches)
    raw = trainer.source.raw_latents(trainer.diffusion, batch, 0, range(8))
    assert scale["factor"] == pytest.approx(1 / raw.double().std().item(), rel=1e-5)
    assert trainer.diffusion.latent_scale.apply(raw).std().item() == pytest.approx(1, rel=1e-5)


def test_the_first_stage_can_set_the_scale(diffusion_config: Make) -> None:
    config = diffusion_config(scaling="first_stage")
    final = train_latent_diffusion(config)
    assert LatentDiffusion.from_pretrained(final).latent_scale.factor == 0.18215


def test_a_vq_first_stage_trains_and_samples(
    autoencoder_config: Callable[..., Any], diffusion_config: Make, tmp_path: Path
) -> None:
    from fastldm.training import train_autoencoder

    settings = {**autoencoder_config().model.config, "num_vq_embeddings": 16}
    first_stage = train_autoencoder(autoencoder_config(model=ModelConfig("VQModel", settings)))
    config = diffusion_config(first_stage=str(first_stage), latent_cache=str(tmp_path / "latents"))
    final = train_latent_diffusion(config)
    assert (final / "vqvae" / "config.json").is_file()
    assert LatentDiffusion.from_pretrained(final).sample(2, num_inference_steps=2).shape[0] == 2


def test_a_cache_alone_is_enough(diffusion_config: Make, data: Any, tmp_path: Path) -> None:
    config = diffusion_config(data=None, latent_cache=str(tmp_path / "latents"))
    with pytest.raises(DataError, match="does not exist"):
        train_latent_diffusion(config)
    encode_dataset(
        load_first_stage(config.first_stage), data(), tmp_path / "latents", progress=False
    )
    train_latent_diffusion(replace(config, overwrite=True))


def test_a_stale_cache_is_refused(
    diffusion_config: Make, autoencoder_config: Callable[..., Any], tmp_path: Path, data: Any
) -> None:
    from fastldm.training import train_autoencoder

    config = diffusion_config(latent_cache=str(tmp_path / "latents"), max_steps=1)
    train_latent_diffusion(config)
    other = train_autoencoder(autoencoder_config(max_steps=1))
    with pytest.raises(DataError, match=r"stale.*first_stage has hash \w{16}.*\w{16}"):
        train_latent_diffusion(replace(config, first_stage=str(other), overwrite=True))
    with pytest.raises(DataError, match="stale latent cache: its data"):
        train_latent_diffusion(replace(config, data=data(holdout_fraction=0.5), overwrite=True))


def test_a_checkpoint_of_the_other_stage_is_refused(
    diffusion_config: Make, autoencoder_config: Callable[..., Any]
) -> None:
    from fastldm.training import train_autoencoder

    first = autoencoder_config(max_steps=1)
    train_autoencoder(first)
    second = diffusion_config(resume=f"{first.output_dir}/checkpoint-1")
    with pytest.raises(CheckpointError, match=r"by AutoencoderTrainer, cannot be resumed by Lat"):
        train_latent_diffusion(second)


def test_augmentation_that_a_cache_does_not_hold_is_named(
    diffusion_config: Make, tmp_path: Path, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = diffusion_config(latent_cache=str(tmp_path / "plain"), max_steps=1)
    train_latent_diffusion(plain)
    assert "no mirrored images" not in caplog.text
    assert "one crop" not in caplog.text
    augmented = data(horizontal_flip=True, vertical_flip=True)
    train_latent_diffusion(replace(plain, data=augmented, overwrite=True))
    assert "no mirrored images" in caplog.text
    assert "one crop of each image" in caplog.text
    caplog.clear()
    flips = replace(plain, latent_cache=str(tmp_path / "flips"), cache_flips=True, overwrite=True)
    train_latent_diffusion(replace(flips, data=data(horizontal_flip=True)))
    assert "no mirrored images" not in caplog.text


def test_classes_can_go_through_the_unet(diffusion_config: Make, tmp_path: Path) -> None:
    plain = diffusion_config().unet
    config = diffusion_config(
        conditioning="class", conditioner=None, unet=plain, latent_cache=str(tmp_path / "latents")
    )
    model = LatentDiffusion.from_pretrained(train_latent_diffusion(config))
    assert model.unet.config["num_class_embeds"] == 4
    images = model.sample(
        class_labels=[0, 2], num_inference_steps=2, guidance_scale=2.0, size=(16, 16)
    )
    assert images.shape == (2, 3, 16, 16)


def test_classes_are_required(diffusion_config: Make, data: Any, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    config = diffusion_config(conditioning="class", data=data(source=str(tmp_path)))
    with pytest.raises(DataError, match=r"classes are required: .*images outside subfolders"):
        train_latent_diffusion(config)
    embedded = replace(
        config,
        conditioning="crossattn",
        conditioner=ModelConfig("ClassEmbedder", {"hidden_size": 8}),
        latent_cache=str(tmp_path / "latents"),
    )
    encode_dataset(load_first_stage(config.first_stage), config.data, embedded.latent_cache)
    with pytest.raises(DataError, match="ClassEmbedder needs them and the data has none"):
        train_latent_diffusion(replace(embedded, data=None))


def test_a_tokenizer_can_be_given(diffusion_config: Make) -> None:
    first = train_latent_diffusion(diffusion_config("first", conditioning="crossattn"))
    config = diffusion_config("second", conditioning="crossattn")
    config.tokenizer.pretrained = str(first / "tokenizer")
    second = train_latent_diffusion(config)
    texts = [(folder / "tokenizer/tokenizer.json").read_text() for folder in (first, second)]
    assert texts[0] == texts[1]


def test_cross_attention_needs_a_conditioner(diffusion_config: Make) -> None:
    config = replace(diffusion_config(conditioning="crossattn"), conditioner=None)
    with pytest.raises(ConfigError, match="conditioner: 'crossattn' needs a TextEncoder"):
        train_latent_diffusion(config)


def test_captions_are_required_for_a_text_encoder(
    diffusion_config: Make, data: Any, images: Path
) -> None:
    config = diffusion_config(conditioning="crossattn", data=data(source=str(images / "red")))
    with pytest.raises(DataError, match="captions are required"):
        train_latent_diffusion(config)


def test_an_image_without_its_caption_is_named(
    diffusion_config: Make, data: Any, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "captioned"
    shutil.copytree(images, folder)
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(rows[1:]))
    lacking = json.loads(rows[0])["file_name"]
    config = diffusion_config(conditioning="crossattn", data=data(source=str(folder)))
    with pytest.raises(DataError, match=f"caption missing for 1 of .* images: {lacking}"):
        train_latent_diffusion(config)


def test_conditions_that_no_data_gives_are_refused(diffusion_config: Make) -> None:
    with pytest.raises(ConfigError, match="concat"):
        train_latent_diffusion(diffusion_config(conditioning="concat"))


def test_a_checkpoint_of_another_architecture_is_refused(diffusion_config: Make) -> None:
    config = diffusion_config()
    train_latent_diffusion(config)
    wider = {**config.unet.config, "block_out_channels": [8, 16]}
    with pytest.raises(CheckpointError, match="another architecture"):
        train_latent_diffusion(
            replace(config, unet=ModelConfig("UNet2DModel", wider), resume="latest")
        )


def test_nan_stops(diffusion_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LatentDiffusion.loss

    def poisoned(self: LatentDiffusion, *args: Any, **kwargs: Any) -> Any:
        loss, logs = original(self, *args, **kwargs)
        return loss * float("nan"), {**logs, "loss": logs["loss"] * float("nan")}

    monkeypatch.setattr(LatentDiffusion, "loss", poisoned)
    config = diffusion_config()
    with pytest.raises(NonFiniteLossError, match=r"step 0.*nan.*no checkpoint"):
        train_latent_diffusion(config)
