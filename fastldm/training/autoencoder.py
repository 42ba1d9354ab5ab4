"""Training of the first stage: an autoencoder against a patch discriminator.

Section 3.1 and appendix G of the paper (arXiv 2112.10752). Both losses of a step come from one
reconstruction, and both optimisers step after the last micro-batch, so that accumulation over
micro-batches is one large batch, apart from statistics that are taken a micro-batch at a time
(the adaptive weight and BatchNorm).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastldm.data import build_dataloader, image_grid, load_images
from fastldm.errors import ConfigError, NonFiniteLossError
from fastldm.losses import FirstStageLoss
from fastldm.models import AutoencoderKL, VQModel
from fastldm.training.batches import BatchStream
from fastldm.training.checkpointing import CheckpointReader, CheckpointWriter, find_checkpoint
from fastldm.training.config import AutoencoderTrainingConfig, ModelConfig
from fastldm.training.ema import ExponentialMovingAverage
from fastldm.training.environment import Environment
from fastldm.training.latent_source import check_resolution
from fastldm.training.logging import MeanOfLogs
from fastldm.training.loop import run_training
from fastldm.training.noise import Stream, generators
from fastldm.training.optimization import (
    Stepper,
    build_optimization,
    learning_rate_factor,
    peak_learning_rate,
)
from fastldm.training.registry import DISCRIMINATORS, FIRST_STAGES, build
from fastldm.training.validation import HeldOutImages, evenly_spaced

Autoencoder = AutoencoderKL | VQModel


def train_autoencoder(config: AutoencoderTrainingConfig) -> Path:
    """Train a first stage.

    Args:
        config: what to train on what; see `AutoencoderTrainingConfig`.

    Returns:
        the folder of the trained autoencoder, ``<output_dir>/final``.

    Raises:
        ConfigError: a configuration is refused, such as a resolution that is no multiple of f.
        DataError: the images cannot be used.
        CheckpointError: the checkpoint to resume from is damaged or of another architecture.
        TrainingError: a loss became NaN or infinite, or the disk is full.
    """
    environment = Environment(config)
    with environment.accelerator.main_process_first():
        checkpoint = find_checkpoint(config.output_dir, config.resume, overwrite=config.overwrite)
    trainer = AutoencoderTrainer(config, environment)
    return run_training(trainer, config, environment, checkpoint)


class _Generator(nn.Module):
    """Autoencoder and loss in one forward pass, so that DDP sees every trainable parameter."""

    def __init__(self, model: Autoencoder, loss: FirstStageLoss, environment: Environment) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._environment = environment

    def forward(
        self,
        images: Tensor,
        noise: list[torch.Generator],
        step: int,
        discriminator: nn.Module | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Total loss, reconstructions without their graph, and logs."""
        # Any: with return_dict=False the same methods give tuples.
        model: Any = self.model
        terms: dict[str, Tensor] = {}
        with self._environment.autocast():
            if isinstance(self.model, VQModel):
                found = model.quantize(model.encode(images).latents)
                reconstructions = model.decode(found.z_q, force_not_quantize=True).sample
                terms = {
                    "codebook_loss": found.codebook_loss,
                    "commitment_loss": found.commitment_loss,
                    "perplexity": found.perplexity,
                    "usage": found.usage,
                }
            else:
                posterior = model.encode(images).latent_dist
                reconstructions = model.decode(posterior.sample(noise)).sample
                if model.has_posterior:
                    terms = {"posterior_kl": posterior.kl()}
        total, logs = self.loss.generator_loss(
            images,
            reconstructions,
            discriminator=discriminator,
            last_layer=model.last_layer,
            global_step=step,
            **terms,
        )
        return total, reconstructions.detach(), logs


class AutoencoderTrainer:
    """One optimiser for the autoencoder, one for the discriminator."""

    description = "autoencoder"

    def __init__(self, config: AutoencoderTrainingConfig, environment: Environment) -> None:
        from accelerate.utils import set_seed

        set_seed(config.seed)
        self.config = config
        self.environment = environment
        self.model: Autoencoder = build(config.model, FIRST_STAGES, "model")
        _check_fit(self.model, config)
        self.loss = FirstStageLoss(config.loss).to(environment.device)
        self.model.train().to(environment.device)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.ema = (
            None
            if config.ema_decay is None
            else ExponentialMovingAverage(self.model, config.ema_decay)
        )
        self.generator = environment.wrap(_Generator(self.model, self.loss, environment))
        self.discriminator: nn.Module | None = None
        rate = peak_learning_rate(config, config.learning_rate, environment.num_processes)
        self.stepper = Stepper(environment.device, scaled=environment.scales_gradients)
        self.optimizations = [
            build_optimization(
                "generator", self.generator.parameters(), config, rate, environment.device
            )
        ]
        if self.loss.uses_discriminator:
            self._add_discriminator(rate)
        dataset = load_images(config.data)
        loader = build_dataloader(
            config.data,
            dataset,
            config.batch_size,
            num_processes=environment.num_processes,
            process_index=environment.process_index,
            pin_memory=environment.device.type == "cuda",
        )
        self.batches = BatchStream(loader)
        self.held_out = HeldOutImages(config.data, config.validation_images, environment)

    def _add_discriminator(self, rate: float) -> None:
        config, environment = self.config, self.environment
        channels = self.model.config["out_channels"]
        settings = {"in_channels": channels, **config.discriminator.config}
        wanted = ModelConfig(
            config.discriminator.class_name, settings, config.discriminator.pretrained
        )
        network = build(wanted, DISCRIMINATORS, "discriminator").train().to(environment.device)
        self.discriminator = environment.wrap(network)
        if config.discriminator_learning_rate is not None:
            rate = peak_learning_rate(
                config, config.discriminator_learning_rate, environment.num_processes
            )
        self.optimizations.append(
            build_optimization(
                "discriminator",
                self.discriminator.parameters(),
                config,
                rate,
                environment.device,
            )
        )

    def train_step(self, step: int, progress: float) -> dict[str, Tensor]:
        """One step of both optimisers."""
        config, environment = self.config, self.environment
        active = self.loss.discriminator_active(step)
        discriminator = self.discriminator if active else None
        networks = [self.generator] + ([] if discriminator is None else [discriminator])
        means = MeanOfLogs(environment.device)
        micro_batches = config.gradient_accumulation_steps
        for number in range(micro_batches):
            images = next(self.batches)["pixel_values"].to(environment.device, non_blocking=True)
            noise = generators(
                config.seed, Stream.POSTERIOR, step, environment.positions(number, len(images))
            )
            with environment.accumulate(networks, last=number == micro_batches - 1):
                total, reconstructions, logs = self.generator(images, noise, step, discriminator)
                self.stepper.backward(total / micro_batches)
                means.add(logs)
                if discriminator is not None:
                    total, logs = self.loss.discriminator_loss(
                        images, reconstructions, discriminator=discriminator, global_step=step
                    )
                    self.stepper.backward(total / micro_batches)
                    means.add({name: logs[name] for name in ("disc_loss", "logits_real")})
        logs = means.means()
        self._require_finite(logs, step)
        factor = learning_rate_factor(config, step, progress)
        logs |= self.stepper.step(self.optimizations[: len(networks)], factor, step)
        logs["learning_rate"] = torch.tensor(self.optimizations[0].learning_rate * factor)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return logs

    def _require_finite(self, logs: dict[str, Tensor], step: int) -> None:
        names = [name for name in ("total", "disc_loss") if name in logs]
        if not self.environment.all_finite(torch.stack([logs[name] for name in names])):
            values = ", ".join(f"{name} {logs[name].item():.4g}" for name in names)
            raise NonFiniteLossError(f"step {step}: the loss is not finite ({values})")

    @property
    def best_model(self) -> Autoencoder:
        """The averaged autoencoder where there is an average, else the trained one."""
        return self.model if self.ema is None else cast(Autoencoder, self.ema.module)

    def _reconstruct(self, images: Tensor) -> Tensor:
        model = self.best_model.eval()
        with torch.no_grad(), self.environment.autocast():
            reconstructions: Tensor = model(images).sample.float()
        self.model.train()
        return reconstructions

    def validate(self) -> dict[str, float]:
        """PSNR and mean absolute error of reconstructions of held-out images."""
        return self.held_out.measure(self._reconstruct, self.config.batch_size)

    def draw(self) -> dict[str, np.ndarray]:
        """Held-out images, each with its reconstruction to its right."""
        held_out = self.held_out.images
        images = held_out[evenly_spaced(self.config.sample_images, len(held_out))]
        images = images.to(self.environment.device)
        pairs = torch.stack([images, self._reconstruct(images)], dim=1).flatten(0, 1)
        return {"reconstructions": image_grid(pairs, columns=8)}

    def save(self, writer: CheckpointWriter) -> None:
        """Store weights, averages, optimisers and gradient scale."""
        for name, module in self._modules().items():
            writer.module(name, module)
        writer.tensors("optimizers", self.stepper.state_dict(self.optimizations))

    def load(self, reader: CheckpointReader) -> None:
        """Take up what `save` stored."""
        for name, module in self._modules().items():
            reader.module(name, module)
        self.stepper.load_state_dict(
            reader.tensors("optimizers"), self.optimizations, str(reader.folder)
        )

    def export(self, folder: Path) -> None:
        """Write the autoencoder in diffusers' layout."""
        self.best_model.save_pretrained(folder)

    def _modules(self) -> dict[str, nn.Module]:
        unwrap = self.environment.accelerator.unwrap_model
        modules: dict[str, Any] = {"model": self.model, "loss": self.loss, "ema": self.ema}
        if self.discriminator is not None:
            modules["discriminator"] = unwrap(self.discriminator)
        return {name: module for name, module in modules.items() if module is not None}


def _check_fit(model: Autoencoder, config: AutoencoderTrainingConfig) -> None:
    check_resolution(config.data, model)
    if model.config["out_channels"] != config.data.channels:
        raise ConfigError(
            f"model.config.out_channels: {model.config['out_channels']}, but data.channels is "
            f"{config.data.channels}"
        )
    if model.config.get("lookup_from_codebook"):
        raise ConfigError("model.config.lookup_from_codebook: train without it, set it afterwards")
