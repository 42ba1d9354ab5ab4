"""The autoencoder trainer: both optimisers, accumulation, resume, every kind of first stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from fastldm.losses import FirstStageLossConfig
from fastldm.models import AutoencoderKL, VQModel
from fastldm.storage import load_weights
from fastldm.training import AutoencoderTrainingConfig, ModelConfig, train_autoencoder
from fastldm.training.checkpointing import list_checkpoints

Metrics = Callable[[str | Path], list[dict[str, Any]]]
Make = Callable[..., AutoencoderTrainingConfig]

ADVERSARIAL = FirstStageLossConfig(perceptual_weight=0.0, discriminator_start=0)


def weights(config: AutoencoderTrainingConfig, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_weights(Path(config.output_dir, f"checkpoint-{step}", f"{name}.safetensors"))


def assert_close(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance, msg=name)


def test_accumulation_of_both_optimisers_is_one_large_batch(
    autoencoder_config: Make, metrics: Metrics
) -> None:
    # With a large eps Adam is near SGD, and differences of rounding are not blown up by 1/√v.
    loss = replace(ADVERSARIAL, adaptive_weight=False, reduction="mean")
    common = {"loss": loss, "adam_eps": 1.0, "learning_rate": 0.1, "max_steps": 2}
    large = autoencoder_config("large", batch_size=4, **common)
    small = autoencoder_config("small", batch_size=1, gradient_accumulation_steps=4, **common)
    train_autoencoder(large)
    train_autoencoder(small)
    for one, two in zip(metrics(large.output_dir)[:2], metrics(small.output_dir)[:2], strict=True):
        for name in ("total", "rec", "kl", "g_loss", "disc_loss", "logits_real",
                     "grad_norm_generator", "grad_norm_discriminator"):  # fmt: skip
            assert one[name] == pytest.approx(two[name], rel=2e-5, abs=1e-6), name
    for name in ("model", "discriminator"):
        assert_close(weights(large, 2, name), weights(small, 2, name), 2e-5)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_resume_is_bit_for_bit(autoencoder_config: Make, metrics: Metrics, kind: str) -> None:
    settings = {**autoencoder_config().model.config}
    if kind == "VQModel":
        settings |= {
            "num_vq_embeddings": 16,
            "codebook_ema_decay": 0.9,
            "dead_code_threshold": 0.5,
            "codebook_initialization": "data",
        }
    # Of 24 images 15 or so are trained on: the restart falls inside of an epoch.
    common = {
        "model": ModelConfig(kind, settings),
        "ema_decay": 0.9,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "checkpoint_every": 6,
        "keep_checkpoints": 5,
    }
    whole = autoencoder_config("whole", max_steps=12, **common)
    train_autoencoder(whole)
    half = autoencoder_config("half", max_steps=12, **common)
    _stop_after(half, 6)
    train_autoencoder(replace(half, resume="latest"))
    for name in ("model", "discriminator", "ema", "loss"):
        one, two = weights(whole, 12, name), weights(half, 12, name)
        assert all(torch.equal(value, two[key]) for key, value in one.items()), name
    timing = ("elapsed_seconds", "images_per_second")
    lines = [
        [{key: value for key, value in line.items() if key not in timing} for line in entry]
        for entry in (metrics(whole.output_dir), metrics(half.output_dir))
    ]
    assert lines[0] == lines[1]


def _stop_after(config: AutoencoderTrainingConfig, step: int) -> None:
    """Train with the schedule of the whole run, but end as a signal would at a step."""
    from fastldm.training.autoencoder import AutoencoderTrainer
    from fastldm.training.environment import Environment
    from fastldm.training.loop import Interrupted, run_training

    trainer = AutoencoderTrainer(config, environment := Environment(config))
    train_step = trainer.train_step

    def stopping(number: int, progress: float) -> dict[str, torch.Tensor]:
        if number == step - 1:
            import signal

            signal.raise_signal(signal.SIGTERM)
        return train_step(number, progress)

    trainer.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=f"step {step}"):
        run_training(trainer, config, environment, None)


def test_the_loss_falls(autoencoder_config: Make, metrics: Metrics) -> None:
    loss = FirstStageLossConfig(perceptual_weight=0.0, discriminator_weight=0.0, reduction="mean")
    config = autoencoder_config(max_steps=250, loss=loss, learning_rate=5e-3)
    final = train_autoencoder(config)
    lines = metrics(config.output_dir)
    recs = [line["rec"] for line in lines if "rec" in line]
    assert sum(recs[-20:]) / 20 < 0.5 * sum(recs[:5]) / 5
    assert lines[-1]["val_psnr"] > 13
    assert "disc_loss" not in lines[0]
    assert isinstance(AutoencoderKL.from_pretrained(final), AutoencoderKL)


def test_every_step_logs_what_goes_wrong_with_discriminators(
    autoencoder_config: Make, metrics: Metrics
) -> None:
    config = autoencoder_config(loss=replace(ADVERSARIAL, discriminator_start=2), max_steps=4)
    train_autoencoder(config)
    lines = [line for line in metrics(config.output_dir) if "total" in line]
    assert len(lines) == 4
    for line in lines[2:]:
        assert {
            "logits_real", "logits_fake", "d_weight", "grad_norm_rec", "grad_norm_adv",
            "grad_norm_generator", "grad_norm_discriminator", "kl", "learning_rate",
        } <= line.keys()  # fmt: skip
        assert line["grad_norm_discriminator"] > 0
        assert line["d_weight"] > 0
    for line in lines[:2]:
        assert line["d_weight"] == 0
        assert "grad_norm_discriminator" not in line


def test_vq_logs_perplexity_and_usage_and_exports_the_average(
    autoencoder_config: Make, metrics: Metrics
) -> None:
    settings = {**autoencoder_config().model.config, "num_vq_embeddings": 16}
    config = autoencoder_config(model=ModelConfig("VQModel", settings), ema_decay=0.5)
    final = train_autoencoder(config)
    line = metrics(config.output_dir)[0]
    assert 1 <= line["perplexity"] <= 16
    assert 0 < line["usage"] <= 1
    exported = VQModel.from_pretrained(final).state_dict()
    averaged = weights(config, 3, "ema")
    assert all(torch.equal(value, averaged[f"module.{name}"]) for name, value in exported.items())
    assert (final / "config.yaml").is_file()


def test_a_plain_autoencoder_trains_without_kl(autoencoder_config: Make, metrics: Metrics) -> None:
    settings = {**autoencoder_config().model.config, "latent_regularization": "none"}
    config = autoencoder_config(model=ModelConfig("AutoencoderKL", settings))
    train_autoencoder(config)
    line = metrics(config.output_dir)[0]
    assert "kl" not in line
    assert line["nll"] == pytest.approx(line["rec"])


def test_bfloat16_keeps_losses_in_float32(autoencoder_config: Make, metrics: Metrics) -> None:
    exact = autoencoder_config("exact", max_steps=1)
    mixed = autoencoder_config("mixed", max_steps=1, mixed_precision="bf16")
    train_autoencoder(exact)
    train_autoencoder(mixed)
    one, two = (metrics(config.output_dir)[0]["rec"] for config in (exact, mixed))
    assert one == pytest.approx(two, rel=0.02)
    assert one != two


def test_gradient_checkpointing_changes_nothing(autoencoder_config: Make) -> None:
    plain = autoencoder_config("plain")
    saving = autoencoder_config("saving", gradient_checkpointing=True)
    train_autoencoder(plain)
    train_autoencoder(saving)
    assert_close(weights(plain, 3, "model"), weights(saving, 3, "model"), 1e-5)


def test_grids_and_validation_are_written(autoencoder_config: Make, metrics: Metrics) -> None:
    config = autoencoder_config(max_steps=4, sample_every=2, validate_every=2, tensorboard=True)
    train_autoencoder(config)
    grids = sorted(Path(config.output_dir, "reconstructions").iterdir())
    assert [grid.name for grid in grids] == ["step-0000002.png", "step-0000004.png"]
    assert [line["step"] for line in metrics(config.output_dir) if "val_psnr" in line] == [2, 4]
    assert list(Path(config.output_dir, "tensorboard").iterdir())


def test_a_resolution_that_f_does_not_divide_is_refused(
    autoencoder_config: Make, data: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"15 is not a multiple of f = 2.*14 or 16"):
        train_autoencoder(autoencoder_config(data=data(resolution=15)))


def test_channels_must_agree(autoencoder_config: Make, data: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="channels"):
        train_autoencoder(autoencoder_config(data=data(channels=1)))


def test_fp16_on_a_cpu_is_refused(autoencoder_config: Make) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        train_autoencoder(autoencoder_config(mixed_precision="fp16"))


def test_a_checkpoint_of_another_architecture_is_refused(autoencoder_config: Make) -> None:
    config = autoencoder_config()
    train_autoencoder(config)
    wider = {**config.model.config, "block_out_channels": [8, 16]}
    changed = replace(config, model=ModelConfig("AutoencoderKL", wider), resume="latest")
    with pytest.raises(CheckpointError, match="another architecture"):
        train_autoencoder(changed)
    assert len(list_checkpoints(config.output_dir)) == 1


def test_a_new_run_does_not_mix_with_an_old_one(autoencoder_config: Make) -> None:
    config = autoencoder_config()
    train_autoencoder(config)
    with pytest.raises(ConfigError, match=r"checkpoint-3.*resume: latest"):
        train_autoencoder(config)
    wrong = replace(config.data, source="/nowhere/at/all")
    with pytest.raises(DataError, match="no such folder"):
        train_autoencoder(replace(config, overwrite=True, data=wrong))
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-3"]
    train_autoencoder(replace(config, overwrite=True, max_steps=1))
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-1"]


def test_a_finished_run_is_not_trained_again(autoencoder_config: Make, metrics: Metrics) -> None:
    config = autoencoder_config(resume="latest")
    final = train_autoencoder(config)
    before = load_weights(final / "diffusion_pytorch_model.safetensors")
    train_autoencoder(config)
    after = load_weights(final / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert max(line["step"] for line in metrics(config.output_dir)) == 3


def test_nan_stops_names_the_step_and_keeps_the_checkpoint(
    autoencoder_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastldm.losses import FirstStageLoss

    original = FirstStageLoss.generator_loss

    def poisoned(self: FirstStageLoss, *args: Any, **kwargs: Any) -> Any:
        total, logs = original(self, *args, **kwargs)
        if kwargs["global_step"] == 3:
            total = total * float("nan")
            logs["total"] = total.detach()
        return total, logs

    monkeypatch.setattr(FirstStageLoss, "generator_loss", poisoned)
    config = autoencoder_config(max_steps=10, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError, match=r"step 3.*nan.*last good .*checkpoint-2 \("):
        train_autoencoder(config)
    assert all(value.isfinite().all() for value in weights(config, 3, "model").values())
    assert not Path(config.output_dir, "final").exists()


def test_the_weights_before_a_nan_never_replace_the_last_good_checkpoint(
    autoencoder_config: Make,
) -> None:
    # Weights this large are finite, and give NaN in the next step.
    config = autoencoder_config(
        max_steps=9, checkpoint_every=1, keep_checkpoints=1, learning_rate=1e30, loss=ADVERSARIAL
    )
    train_autoencoder(replace(config, max_steps=2, learning_rate=1e-3))
    with pytest.raises(NonFiniteLossError, match=r"step 3.*checkpoint-2 \(checkpoint-3 holds the"):
        train_autoencoder(replace(config, resume="latest"))
    names = [path.name for path in list_checkpoints(config.output_dir)]
    assert names == ["checkpoint-2", "checkpoint-3"]
    good = replace(config, resume=f"{config.output_dir}/checkpoint-2", learning_rate=1e-3)
    train_autoencoder(good)
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-9"]


def test_a_part_that_the_checkpoint_lacks_is_named(autoencoder_config: Make) -> None:
    config = autoencoder_config(max_steps=1, loss=ADVERSARIAL)
    train_autoencoder(replace(config, loss=replace(ADVERSARIAL, discriminator_weight=0.0)))
    with pytest.raises(CheckpointError, match=r"checkpoint-1: its run had no discriminator and"):
        train_autoencoder(replace(config, max_steps=2, resume="latest"))


def test_a_damaged_checkpoint_names_the_one_before(autoencoder_config: Make) -> None:
    config = autoencoder_config(max_steps=2, checkpoint_every=1)
    train_autoencoder(config)
    path = Path(config.output_dir, "checkpoint-2", "model.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"damaged: .*resume: .*checkpoint-1$"):
        train_autoencoder(replace(config, resume="latest"))


def test_a_huge_learning_rate_is_stopped_before_the_weights_are_poisoned(
    autoencoder_config: Make,
) -> None:
    loss = FirstStageLossConfig(perceptual_weight=0.0, reconstruction="l2", discriminator_weight=0)
    config = autoencoder_config(
        max_steps=200, checkpoint_every=1, learning_rate=1e18, loss=loss, warmup_steps=0
    )
    with pytest.raises(NonFiniteLossError, match=r"step \d+"):
        train_autoencoder(config)
    for checkpoint in list_checkpoints(config.output_dir):
        stored = load_weights(checkpoint / "model.safetensors")
        assert all(value.isfinite().all() for value in stored.values())
