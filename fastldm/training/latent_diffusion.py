"""Training of the second stage: a diffusion model of latents, with its conditioner.

Sections 3.2 and 3.3 of the paper (arXiv 2112.10752). Noise, time steps and dropped conditions
belong to a sample's place in the step's global batch, so that they do not depend on the number of
processes or micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastldm.data import image_grid
from fastldm.errors import NonFiniteLossError
from fastldm.latent_diffusion import LatentDiffusion, LatentScale
from fastldm.models import CaptionTokenizer
from fastldm.storage import write_json
from fastldm.training.assembly import (
    build_diffusion,
    build_tokenizer,
    condition_of,
    require_trainable,
    uses_captions,
    with_required_conditions,
)
from fastldm.training.checkpointing import CheckpointReader, CheckpointWriter, find_checkpoint
from fastldm.training.config import LatentDiffusionTrainingConfig
from fastldm.training.ema import ExponentialMovingAverage
from fastldm.training.environment import Environment
from fastldm.training.latent_source import LatentSource
from fastldm.training.logging import MeanOfLogs
from fastldm.training.loop import run_training
from fastldm.training.noise import Stream, generators, integers, normal, uniform
from fastldm.training.optimization import (
    Stepper,
    build_optimization,
    learning_rate_factor,
    peak_learning_rate,
)
from fastldm.training.registry import load_first_stage
from fastldm.training.validation import evenly_spaced, fixed_items

_CALIBRATION_ITEMS = 4096
_TOKENIZER = "tokenizer"


def train_latent_diffusion(config: LatentDiffusionTrainingConfig) -> Path:
    """Train a diffusion model on the latents of a trained first stage.

    Args:
        config: what to train on what; see `LatentDiffusionTrainingConfig`.

    Returns:
        the folder of the trained model, ``<output_dir>/final``, for `LatentDiffusion`.

    Raises:
        ConfigError: a configuration is refused, or two parts do not fit each other.
        DataError: the images or latents cannot be used; the latent cache is stale.
        CheckpointError: the first stage or the checkpoint to resume from is damaged or of another
            architecture.
        TrainingError: a loss became NaN or infinite, or the disk is full.
    """
    require_trainable(config)
    environment = Environment(config)
    with environment.accelerator.main_process_first():
        checkpoint = find_checkpoint(config.output_dir, config.resume, overwrite=config.overwrite)
    trainer = LatentDiffusionTrainer(config, environment, checkpoint)
    return run_training(trainer, config, environment, checkpoint)


class _Denoiser(nn.Module):
    """`LatentDiffusion.loss` under the run's precision, for DDP to wrap."""

    def __init__(self, diffusion: LatentDiffusion, environment: Environment) -> None:
        super().__init__()
        self.diffusion = diffusion
        self._environment = environment

    def forward(self, z: Tensor, cond: Any, **draws: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with self._environment.autocast():
            return self.diffusion.loss(z, cond, **draws)


class LatentDiffusionTrainer:
    """UNet, conditioner and learned variances under one optimiser."""

    description = "latent diffusion"

    def __init__(
        self,
        config: LatentDiffusionTrainingConfig,
        environment: Environment,
        checkpoint: Path | None = None,
    ) -> None:
        from accelerate.utils import set_seed

        set_seed(config.seed)
        config = with_required_conditions(config)
        self.config = config
        self.environment = environment
        first_stage = load_first_stage(config.first_stage)
        first_stage.to(environment.device)
        self.source = LatentSource(config, first_stage, environment)
        self.batches = self.source.batches
        names = self.source.class_names if self.source.has_labels else None
        self.diffusion = build_diffusion(
            config,
            first_stage,
            self.source.latent_shape,
            self._tokenizer(checkpoint),
            None if names is None else len(names),
        )
        self.diffusion.to(environment.device).train()
        trained = {"unet": self.diffusion.unet}
        if self.diffusion.conditioner is not None:
            trained["conditioner"] = self.diffusion.conditioner
        self.trained = nn.ModuleDict(trained)
        self.ema = (
            None
            if config.ema_decay is None
            else ExponentialMovingAverage(self.trained, config.ema_decay)
        )
        if checkpoint is None:
            self._calibrate()
        self.denoiser = environment.wrap(_Denoiser(self.diffusion, environment))
        rate = peak_learning_rate(config, config.learning_rate, environment.num_processes)
        self.stepper = Stepper(environment.device, scaled=environment.scales_gradients)
        self.optimizations = [
            build_optimization("unet", self.denoiser.parameters(), config, rate, environment.device)
        ]
        self.fixed = self._fixed_batch() if environment.is_main else {}

    def _tokenizer(self, checkpoint: Path | None) -> CaptionTokenizer | None:
        if not uses_captions(self.config):
            return None
        if checkpoint is not None:
            return CaptionTokenizer.from_pretrained(checkpoint / _TOKENIZER)
        from accelerate.utils import broadcast_object_list
        from tokenizers import Tokenizer

        # Training a vocabulary breaks ties by chance, so that all processes take the main one's.
        tokenizer = build_tokenizer(self.config, self.source.captions)
        shared = [tokenizer.tokenizer.to_str()]
        broadcast_object_list(shared)
        return CaptionTokenizer(Tokenizer.from_str(shared[0]), tokenizer.max_length)

    def _calibrate(self) -> None:
        """Set the scale of the latents from the first batch, or from the cache."""
        config, environment = self.config, self.environment
        if config.scaling == "first_stage":
            return
        per_channel = config.scaling == "per_channel"
        count = config.gradient_accumulation_steps
        if per_channel:
            count = max(count, self.source.batches_within(_CALIBRATION_ITEMS))
        parts = []
        for number in range(count):
            batch = next(self.batches)
            positions = environment.positions(number, config.batch_size)
            raw = self.source.raw_latents(self.diffusion, batch, 0, positions)
            parts.append(environment.accelerator.gather(raw))
        self.batches.restart(0, 0)
        self.diffusion.calibrate_scale(torch.cat(parts), per_channel=per_channel)

    def train_step(self, step: int, progress: float) -> dict[str, Tensor]:
        """One optimiser step."""
        config, environment = self.config, self.environment
        means = MeanOfLogs(environment.device)
        micro_batches = config.gradient_accumulation_steps
        for number in range(micro_batches):
            batch = next(self.batches)
            positions = environment.positions(number, len(batch["index"]))
            raw = self.source.raw_latents(self.diffusion, batch, step, positions)
            z = self.diffusion.latent_scale.apply(raw)
            with environment.accumulate([self.denoiser], last=number == micro_batches - 1):
                loss, logs = self.denoiser(
                    z, condition_of(config, batch), **self._draws(z, step, positions)
                )
                self.stepper.backward(loss / micro_batches)
            means.add(logs)
        logs = means.means()
        if not environment.all_finite(logs["loss"]):
            raise NonFiniteLossError(f"step {step}: the loss is {logs['loss'].item()}")
        factor = learning_rate_factor(config, step, progress)
        logs |= self.stepper.step(self.optimizations, factor, step)
        logs["learning_rate"] = torch.tensor(self.optimizations[0].learning_rate * factor)
        if self.ema is not None:
            self.ema.update_parameters(self.trained)
        return logs

    def _draws(self, z: Tensor, step: int, positions: range) -> dict[str, Tensor | None]:
        """Noise, time steps and dropped conditions of one micro-batch."""
        seed = self.config.seed

        def sources(stream: Stream) -> list[torch.Generator]:
            return generators(seed, stream, step, positions)

        drop = None
        if self.config.conditioning_dropout > 0:
            drop = uniform(sources(Stream.DROPOUT)) < self.config.conditioning_dropout
        return {
            "noise": normal(sources(Stream.NOISE), z.shape[1:]).to(z),
            "timesteps": integers(
                sources(Stream.TIMESTEP), self.diffusion.objective.num_timesteps
            ).to(z.device),
            "drop": drop,
        }

    def _fixed_batch(self) -> dict[str, Any]:
        """Latents, noise and time steps that never change, of held-out images where possible."""
        config = self.config
        count = config.validation_images
        if config.data is not None:
            batch = fixed_items(config.data, count)
        else:
            self.batches.restart(0, 0)
            batch = next(self.batches)
            self.batches.restart(0, 0)
        positions = range(len(batch["index"]))
        raw = torch.cat(
            [
                self.source.raw_latents(self.diffusion, part, 0, part_positions)
                for part, part_positions in _split(batch, positions, config.batch_size)
            ]
        )
        sources = generators(config.seed, Stream.VALIDATION, 0, positions)
        last = self.diffusion.objective.num_timesteps - 1
        return {
            **batch,
            "raw": raw,
            "noise": normal(sources, raw.shape[1:]).to(raw),
            "timesteps": torch.linspace(0, last, len(raw)).round().long().to(raw.device),
        }

    def validate(self) -> dict[str, float]:
        """``val_loss`` on fixed noise, and ``val_loss_ema`` of the averaged weights."""
        values = {"val_loss": self._validation_loss()}
        if self.ema is not None:
            with self.diffusion.using(**self._averaged()):
                values["val_loss_ema"] = self._validation_loss()
        return values

    @torch.no_grad()
    def _validation_loss(self) -> float:
        diffusion, fixed = self.diffusion.eval(), self.fixed
        total = 0.0
        for part, positions in _split(fixed, range(len(fixed["raw"])), self.config.batch_size):
            with self.environment.autocast():
                _, logs = diffusion.loss(
                    diffusion.latent_scale.apply(part["raw"]),
                    condition_of(self.config, part),
                    noise=part["noise"],
                    timesteps=part["timesteps"],
                )
            total += logs["loss_simple"].item() * len(positions)
        diffusion.train()
        return total / len(fixed["raw"])

    def draw(self) -> dict[str, np.ndarray]:
        """Samples of the averaged model, with the captions or classes of held-out images."""
        config = self.config
        shown = evenly_spaced(config.sample_images, len(self.fixed["raw"]))
        cond = condition_of(config, self.fixed)
        if cond is not None:
            cond = cond[shown] if isinstance(cond, Tensor) else [cond[number] for number in shown]
        guidance = 1.0 if cond is None else config.sampling.guidance_scale
        with self.diffusion.using(**self._averaged()), self.environment.autocast():
            images = self.diffusion.sample(
                len(shown),
                conditioning=cond,
                num_inference_steps=config.sampling.num_inference_steps,
                guidance_scale=guidance,
                eta=config.sampling.eta,
                seeds=config.seed,
                size=self._image_size(),
            )
        captions = None
        if isinstance(cond, Tensor):
            names = self.source.class_names
            captions = [names[label] if names else str(label) for label in cond.tolist()]
        elif cond is not None:
            captions = list(cond)
        return {"samples": image_grid(images, captions=captions)}

    def _image_size(self) -> tuple[int, int]:
        f = self.diffusion.first_stage.downsampling_factor
        return self.source.latent_shape[1] * f, self.source.latent_shape[2] * f

    def _averaged(self) -> dict[str, nn.Module]:
        """The averaged parts by the names that `LatentDiffusion` has for them; none without EMA."""
        return {} if self.ema is None else dict(cast(nn.ModuleDict, self.ema.module).items())

    def save(self, writer: CheckpointWriter) -> None:
        """Store weights, averages, optimiser, scale of the latents and tokenizer."""
        for name, module in self._modules().items():
            writer.module(name, module)
        writer.tensors("optimizers", self.stepper.state_dict(self.optimizations))
        scale = self.diffusion.latent_scale
        writer.json(
            "latent_scale",
            {"factor": scale.factor, "mean": scale.mean, "std": scale.std, "shift": scale.shift},
        )
        if self.diffusion.tokenizer is not None:
            self.diffusion.tokenizer.save_pretrained(writer.folder / _TOKENIZER)

    def load(self, reader: CheckpointReader) -> None:
        """Take up what `save` stored."""
        for name, module in self._modules().items():
            reader.module(name, module)
        self.stepper.load_state_dict(
            reader.tensors("optimizers"), self.optimizations, str(reader.folder)
        )
        scale = reader.json("latent_scale")
        mean, std = (
            None if scale[name] is None else tuple(scale[name]) for name in ("mean", "std")
        )
        self.diffusion.set_scale(
            LatentScale(self.diffusion.latent_channels, scale["factor"], mean, std, scale["shift"])
        )

    def export(self, folder: Path) -> None:
        """Write both stages as a diffusers-style folder, with averaged weights."""
        self.diffusion.save_pretrained(folder, **self._averaged())
        if self.source.class_names is not None and self.config.conditioning != "none":
            write_json(folder / "class_names.json", self.source.class_names)

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, Any] = {"model": self.trained, "ema": self.ema}
        if any(True for _ in self.diffusion.objective.parameters()):
            modules["objective"] = self.diffusion.objective
        return {name: module for name, module in modules.items() if module is not None}


def _split(
    batch: dict[str, Any], positions: range, size: int
) -> list[tuple[dict[str, Any], range]]:
    """A batch in parts of at most `size` items, with their positions."""
    return [
        (
            {name: values[start : start + size] for name, values in batch.items()},
            positions[start : start + size],
        )
        for start in range(0, len(positions), size)
    ]
