"""Moving averages of weights, with CompVis's warm-up of the decay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class ExponentialMovingAverage(AveragedModel):
    """The average of a model's parameters; buffers are copied.

    The n-th update has the decay min(decay, (1 + n) / (10 + n)), n = 1, 2, …, as in CompVis's
    LitEma, so that a short run is not an average with its random initialisation. The model as it
    was at the start takes part with the first update's decay, 2/11.

    Args:
        model: the model to follow; the average starts as a copy of it, without gradients.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        @torch.no_grad()
        def average(
            averaged: tuple[Tensor, ...] | list[Tensor],
            current: tuple[Tensor, ...] | list[Tensor],
            updates: Tensor | int,
        ) -> None:
            count = float(updates)
            warm = min(decay, (1.0 + count) / (10.0 + count))
            torch._foreach_lerp_(list(averaged), list(current), 1.0 - warm)

        super().__init__(model, multi_avg_fn=average)
        self.module.eval().requires_grad_(False)
        # From 0 the first update would be a copy, and the schedule one update late.
        self.n_averaged.fill_(1)
