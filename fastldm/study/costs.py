"""What a cell's trainings and samples cost in floating-point operations, and what is bought."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastldm.errors import ConfigError
from fastldm.models import IdentityFirstStage
from fastldm.ops import backend
from fastldm.profiling import flops as flops  # registers the formulas of attention on a CPU
from fastldm.study.cells import Cell, diffusion_training, first_stage_training
from fastldm.study.config import StudyConfig
from fastldm.training.assembly import build_diffusion
from fastldm.training.autoencoder import AutoencoderTrainer
from fastldm.training.environment import Environment

TFLOP = 1e12


@dataclass(frozen=True)
class Costs:
    """Floating-point operations of one cell; a multiplication and an addition count as two.

    Convolutions, matrix products and attention are counted, as by ``torch.utils.flop_counter``,
    over the calls that the trainer makes, backward passes, LPIPS and discriminator included.

    Attributes:
        first_stage_step: a training step before the discriminator starts; 0 without first stage.
        adversarial_step: one from then on.
        adversarial_start: that step.
        encoding: encoding all training images once; 0 where there is no latent cache.
        diffusion_step: a training step of the diffusion model.
        denoising: one evaluation of the UNet for one image.
        decoding: decoding one image.
        first_stage_parameters, unet_parameters: how many there are.
        latent_shape: [c, h, w].
    """

    first_stage_step: int
    adversarial_step: int
    adversarial_start: int
    encoding: int
    diffusion_step: int
    denoising: int
    decoding: int
    first_stage_parameters: int
    unet_parameters: int
    latent_shape: list[int]

    def first_stage(self, steps: int) -> int:
        """Operations of so many training steps of the first stage."""
        plain = min(steps, self.adversarial_start)
        return plain * self.first_stage_step + (steps - plain) * self.adversarial_step

    def first_stage_steps(self, budget: float) -> int:
        """Training steps of the first stage that a budget buys."""
        plain = int(budget // self.first_stage_step)
        if plain <= self.adversarial_start:
            return plain
        left = budget - self.first_stage(self.adversarial_start)
        return self.adversarial_start + int(left // self.adversarial_step)

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def count_flops(function: Callable[[], object]) -> int:
    """Operations of the convolutions, matrix products and attention in a call.

    The reference operators are what serves it, because the counter cannot see into a kernel.
    """
    counter = _Counter()
    with backend("reference"), counter:
        function()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up the formulas of torch.utils.flop_counter.

    Its own mode hooks every module's backward pass, which ends with an error where the adaptive
    weight takes the gradient of the discriminator's input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def measure_costs(cell: Cell, config: StudyConfig, num_images: int) -> Costs:
    """Count a cell's costs with untrained models.

    Args:
        num_images: in the training split.
    """
    first_stage, steps, start = _first_stage_costs(cell, config)
    side = config.data.resolution // cell.f
    shape = [cell.latent_channels(config), side, side]
    training = diffusion_training(cell, config, Path("unused"), max_steps=1)
    device = Environment(training).device
    model = build_diffusion(training, first_stage, shape, None, None).to(device).train()
    z = torch.randn(1, *shape, device=device)
    image = torch.randn(1, config.data.channels, *[config.data.resolution] * 2, device=device)

    def train_on_one() -> None:
        model.loss(z)[0].backward()

    step = count_flops(train_on_one)
    with torch.no_grad():
        timestep = torch.zeros(1, dtype=torch.int64, device=device)
        denoising = count_flops(lambda: model.unet(z, timestep))
        decoding = count_flops(lambda: model.decode(z))
        encoding = count_flops(lambda: model.encode(image))
    if training.latent_cache is None:
        step, encoding = step + encoding, 0
    return Costs(
        *steps,
        adversarial_start=start,
        encoding=encoding * num_images * (2 if training.cache_flips else 1),
        diffusion_step=step * training.batch_size,
        denoising=denoising,
        decoding=decoding,
        first_stage_parameters=sum(p.numel() for p in first_stage.parameters()),
        unet_parameters=sum(p.numel() for p in model.unet.parameters()),
        latent_shape=shape,
    )


def _first_stage_costs(cell: Cell, config: StudyConfig) -> tuple[Any, tuple[int, int], int]:
    """An untrained first stage, the costs of a step before and with the discriminator, and when
    that starts."""
    if cell.is_pixel:
        return IdentityFirstStage(config.data.channels), (0, 0), 0
    training = first_stage_training(cell, config, max_steps=1)
    trainer = AutoencoderTrainer(training, Environment(training))
    # Codebooks that start from data do so in the first step, which is not counted.
    trainer.train_step(0, 0.0)
    plain = count_flops(lambda: trainer.train_step(0, 0.0))
    start = training.loss.discriminator_start if trainer.discriminator is not None else 0
    adversarial = plain
    if trainer.discriminator is not None:
        adversarial = count_flops(lambda: trainer.train_step(start, 0.0))
    return trainer.model, (plain, adversarial), start


@dataclass(frozen=True)
class Plan:
    """What a cell's budget buys.

    Attributes:
        first_stage: ``max_steps`` or ``max_minutes`` of the first stage; empty for pixels.
        points: the same of the diffusion model at each point of its curve.
    """

    first_stage: dict[str, float]
    points: list[dict[str, float]]


def plan(cell: Cell, config: StudyConfig, costs: Costs) -> Plan:
    """Share out the budget.

    Raises:
        ConfigError: it does not buy a step of the first stage, or one for each point.
    """
    share = 0.0 if cell.is_pixel else config.first_stage_share
    numbers = range(1, config.points + 1)
    if config.budget_minutes is not None:
        minutes = config.budget_minutes
        points = [minutes * (1 - share) * number / config.points for number in numbers]
        first = {} if cell.is_pixel else {"max_minutes": minutes * share}
        return Plan(first, [{"max_minutes": value} for value in points])
    assert config.budget_tflop is not None
    budget = config.budget_tflop * TFLOP
    first = {}
    if not cell.is_pixel:
        steps = costs.first_stage_steps(share * budget)
        if steps < 1:
            _refuse(config, cell, "the first stage", costs.first_stage_step / share)
        first = {"max_steps": steps}
    left = (1 - share) * budget - costs.encoding
    steps = int(left // costs.diffusion_step)
    if steps < config.points:
        needed = (config.points * costs.diffusion_step + costs.encoding) / (1 - share)
        _refuse(config, cell, f"the diffusion model at each of {config.points} points", needed)
    return Plan(first, [{"max_steps": steps * number // config.points} for number in numbers])


def _refuse(config: StudyConfig, cell: Cell, what: str, needed: float) -> None:
    raise ConfigError(
        f"budget_tflop: {config.budget_tflop:g} is too small for {cell.name}: one training step of "
        f"{what} needs a budget of {needed / TFLOP:.3g}"
    )
