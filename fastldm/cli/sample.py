"""``fastldm sample``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastldm.cli.common import default_device, save_image, write_errors
from fastldm.cli.parsing import parse_config
from fastldm.errors import ConfigError
from fastldm.storage import atomic_file, read_json

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Classes and options of the samplers, by the names of the option."""


@dataclass(kw_only=True)
class SampleConfig:
    """What to draw, and how."""

    model: str
    """Folder of the trained model, or a diffusers folder of a latent diffusion model."""
    output_dir: str = "samples"
    """Folder for the images, ``grid.png`` and ``samples.jsonl``."""
    captions: list[str] | str | None = None
    """One caption, or a list such as '["red heart", "flag of France"]'."""
    classes: list[int | str] | int | str | None = None
    """A class or a list of them, by number or by name."""
    num_images: int = 1
    """Images for each caption or class; without conditions, of all."""
    num_inference_steps: int = 50
    """Steps of the sampler."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    eta: float = 0.0
    """η of DDIM: 0 deterministic, 1 as noisy as DDPM."""
    scheduler: Literal[
        "saved", "ddim", "ddpm", "plms", "dpmsolver++", "sde-dpmsolver++", "euler",
        "euler-ancestral", "heun", "lms", "unipc", "lcm",
    ] = "saved"  # fmt: skip
    """Sampler: the model's own or another on the same noise schedule."""
    seed: int = 0
    """Seed of the first image; the next ones have the next seeds."""
    resolution: int | None = None
    """Height and width in pixels; by default the model's."""
    batch_size: int = 16
    """Images drawn at once."""
    cpu: bool = False
    """Stay on the CPU although there is an accelerator."""

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.captions is not None and self.classes is not None:
            raise ConfigError("captions, classes: give one of them")


def run(arguments: Sequence[str]) -> None:
    """Draw images and write them."""
    config = parse_config(SampleConfig, arguments, "sample", "Draw images from a trained model.")
    import torch

    from fastldm.data import save_image_grid
    from fastldm.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.from_pretrained(config.model).to(default_device(config.cpu))
    texts, conditions = _conditions(config)
    _check_conditions(config, model)
    count = config.num_images * (1 if conditions is None else len(conditions))
    if conditions is not None:
        texts = [text for text in texts for _ in range(config.num_images)]
        conditions = [entry for entry in conditions for _ in range(config.num_images)]
    scheduler = _scheduler(config, model)
    size = None if config.resolution is None else (config.resolution, config.resolution)
    parts = []
    for start in range(0, count, config.batch_size):
        stop = min(count, start + config.batch_size)
        cond: Any = None if conditions is None else conditions[start:stop]
        images = model.sample(
            stop - start,
            conditioning=cond,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            eta=config.eta,
            seeds=config.seed + start,
            scheduler=scheduler,
            size=size,
            progress=True,
        )
        parts.append(images.cpu())
    images = torch.cat(parts)
    output_dir = Path(config.output_dir)
    with write_errors(config.output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, image in enumerate(images):
            name = f"{number:05}.png"
            save_image(image, output_dir / name)
            entry = {"file_name": name, "seed": config.seed + number}
            lines.append(json.dumps({**entry, "caption": texts[number]} if texts else entry))
        with atomic_file(output_dir / "samples.jsonl") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        save_image_grid(images, output_dir / "grid.png", captions=texts or None)
    print(output_dir)


def _conditions(config: SampleConfig) -> tuple[list[str], list[Any] | None]:
    """What to write under each condition, and the conditions."""
    if config.captions is not None:
        captions = [config.captions] if isinstance(config.captions, str) else config.captions
        return list(captions), list(captions)
    if config.classes is None:
        return [], None
    wanted = config.classes if isinstance(config.classes, list) else [config.classes]
    names_file = Path(config.model, "class_names.json")
    names = read_json(names_file) if names_file.is_file() else []
    numbers = []
    for entry in wanted:
        if isinstance(entry, str) and not entry.isdigit():
            number = names.index(entry) if entry in names else -1
        else:
            number = int(entry)
        if number < 0 or (names and number >= len(names)):
            known = ", ".join(map(str, names)) or "none are stored with this model"
            raise ConfigError(f"classes: no class {entry!r}; names: {known}")
        numbers.append(number)
    return [names[number] if names else str(number) for number in numbers], numbers


def _check_conditions(config: SampleConfig, model: Any) -> None:
    """Name the option, where the model would name an argument of its own."""
    if model.conditioning in ("concat", "hybrid"):
        raise ConfigError(
            f"model: {config.model} is conditioned on images; draw from it with "
            "fastldm.LatentDiffusion.sample"
        )
    takes = None
    if model.conditioning != "none":
        takes = "classes" if model.tokenizer is None else "captions"
    for name in ("captions", "classes"):
        given = getattr(config, name) is not None
        if given and takes is None:
            raise ConfigError(f"{name}: given, but {config.model} is unconditional")
        if given != (name == takes):
            raise ConfigError(f"{takes}: {config.model} is conditioned on them; give some")


def _scheduler(config: SampleConfig, model: Any) -> Any:
    import fastldm

    if config.scheduler == "saved":
        return None
    name, options = _SCHEDULERS[config.scheduler]
    return getattr(fastldm, name).from_config(model.scheduler.config, **options)
