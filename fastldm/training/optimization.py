"""Learning rates, and optimisers that share one gradient scaler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError, NonFiniteLossError
from fastldm.training.config import TrainingConfig


def learning_rate_factor(config: TrainingConfig, step: int, progress: float) -> float:
    """The factor on the peak learning rate at a step.

    Args:
        step: optimiser steps done; the warm-up is linear over the first ``warmup_steps``.
        progress: share of the budget used, 0…1, which drives the decay.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decayed = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.lr_schedule]
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * decayed


def peak_learning_rate(config: TrainingConfig, base: float, num_processes: int) -> float:
    """`base`, or with ``scale_lr`` CompVis's base × batch × processes × accumulation."""
    if not config.scale_lr:
        return base
    return base * config.batch_size * num_processes * config.gradient_accumulation_steps


@dataclass
class Optimization:
    """One optimiser with its parameters and peak learning rate."""

    name: str
    optimizer: torch.optim.Optimizer
    learning_rate: float
    max_grad_norm: float | None

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that the optimiser moves."""
        return (entry for group in self.optimizer.param_groups for entry in group["params"])

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Take up a stored state.

        Raises:
            CheckpointError: it belongs to other parameters.
        """
        try:
            self.optimizer.load_state_dict(state)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{source}: the state of the {self.name} optimiser belongs to another "
                f"architecture ({error})"
            ) from None
        for parameter, stored in self.optimizer.state.items():
            for key, value in stored.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{source}: the {self.name} optimiser's {key} is {list(value.shape)}, its "
                        f"parameter is {list(parameter.shape)}: another architecture"
                    )


def build_optimization(
    name: str,
    parameters: Iterable[nn.Parameter],
    config: TrainingConfig,
    learning_rate: float,
    device: torch.device,
) -> Optimization:
    """AdamW with the settings of `config`; without weight decay that is Adam."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=learning_rate,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=device.type in ("cuda", "cpu"),
    )
    return Optimization(name, optimizer, learning_rate, config.max_grad_norm)


class Stepper:
    """Steps several optimisers together under one gradient scaler.

    Updating the scale between two optimisers, as one scaler step for each would, unscales the
    second one's gradients by the wrong number whenever the scale changes; here it is updated
    once, after all of them.
    """

    def __init__(self, device: torch.device, *, scaled: bool) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`, scaled."""
        self.scaler.scale(loss).backward()

    def step(
        self, optimizations: Iterable[Optimization], factor: float, step: int
    ) -> dict[str, Tensor]:
        """Clip and apply the gathered gradients, and clear them.

        Args:
            factor: on each peak learning rate.
            step: named in an error.

        Returns:
            ``grad_norm_<name>`` before clipping, for each optimiser.

        Raises:
            NonFiniteLossError: a gradient is NaN or infinite and no scaler is there to skip the
                step; no parameter was changed.
        """
        optimizations = list(optimizations)
        logs: dict[str, Tensor] = {}
        for entry in optimizations:
            self.scaler.unscale_(entry.optimizer)
            norm = torch.nn.utils.get_total_norm(
                [item.grad for item in entry.parameters if item.grad is not None]
            )
            if not self.scaler.is_enabled() and not torch.isfinite(norm):
                raise NonFiniteLossError(
                    f"step {step}: the gradient norm of the {entry.name} is {norm.item()}; "
                    "lower the learning rate or set max_grad_norm"
                )
            if entry.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(entry.parameters, entry.max_grad_norm, norm)
            logs[f"grad_norm_{entry.name}"] = norm
        for entry in optimizations:
            for group in entry.optimizer.param_groups:
                group["lr"] = entry.learning_rate * factor
            self.scaler.step(entry.optimizer)
            entry.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return logs

    def state_dict(self, optimizations: Iterable[Optimization]) -> dict[str, Any]:
        """The states of the optimisers by name, and that of the scaler."""
        states = {entry.name: entry.optimizer.state_dict() for entry in optimizations}
        return {**states, "scaler": self.scaler.state_dict()}

    def load_state_dict(
        self, states: dict[str, Any], optimizations: Iterable[Optimization], source: str
    ) -> None:
        """Take up what `state_dict` gave.

        Raises:
            CheckpointError: an optimiser is missing or belongs to other parameters.
        """
        for entry in optimizations:
            if entry.name not in states:
                raise CheckpointError(f"{source}: no state of the {entry.name} optimiser")
            entry.load_state_dict(states[entry.name], source)
        if self.scaler.is_enabled() and states.get("scaler"):
            self.scaler.load_state_dict(states["scaler"])
