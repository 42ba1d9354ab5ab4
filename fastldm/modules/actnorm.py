"""Activation normalisation with data-dependent initialisation (Glow, arXiv 1807.03039, 3.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fastldm.errors import TrainingError

_STD_EPS = 1e-6


class ActNorm(nn.Module):
    """y = scale · (x + loc) per channel; the first training batch comes out with mean 0, std 1.

    Parameters and buffer are those of taming-transformers: ``loc`` and ``scale`` [1, C, 1, 1] and
    ``initialized``. In a process group the first batch is that of all processes, so that all
    start with the same parameters; every process must run the first forward pass.

    Args:
        num_features: channels C.
        logdet: return (y, log|det ∂y/∂x| [B]) instead of y.
        allow_reverse_init: let the first call be a training-mode `reverse`, from its own input.
        synchronize_init: set False to initialise from this process's batch alone.
    """

    initialized: Tensor

    def __init__(
        self,
        num_features: int,
        logdet: bool = False,
        allow_reverse_init: bool = False,
        *,
        synchronize_init: bool = True,
    ) -> None:
        super().__init__()
        self.logdet = logdet
        self.allow_reverse_init = allow_reverse_init
        self.synchronize_init = synchronize_init
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        # The buffer's value, kept here because reading a CUDA buffer waits for the device.
        self._known_initialized = False

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [B, C, H, W] or [B, C].

        Raises:
            TrainingError: the layer is not initialised and is not in training mode.
        """
        if reverse:
            return self.reverse(x)
        if not self._is_initialized():
            self._require_training()
            self._initialize(x)
        loc, scale = self._affine(x)
        y = scale * (x + loc)
        if not self.logdet:
            return y
        positions = math.prod(x.shape[2:])
        log_det = positions * torch.log(torch.abs(self.scale)).sum()
        return y, log_det.expand(x.shape[0])

    def reverse(self, y: Tensor) -> Tensor:
        """The x of which `forward` makes y.

        Raises:
            TrainingError: the layer is not initialised, and not both in training mode and made
                with `allow_reverse_init`.
        """
        if not self._is_initialized():
            if not self.allow_reverse_init:
                raise TrainingError(
                    "ActNorm: run one forward pass in training mode before reverse, or make it "
                    "with allow_reverse_init=True"
                )
            self._require_training()
            self._initialize(y)
        loc, scale = self._affine(y)
        return y / scale - loc

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim == 2:
            return self.loc.flatten(1), self.scale.flatten(1)
        return self.loc, self.scale

    def _is_initialized(self) -> bool:
        if not self._known_initialized:
            self._known_initialized = bool(self.initialized.item())
        return self._known_initialized

    def _require_training(self) -> None:
        if not self.training:
            raise TrainingError(
                "ActNorm: not initialised: it takes its scale from the first batch in training "
                "mode; run one, or load trained weights, before eval()"
            )

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        values = x.transpose(0, 1).flatten(1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        count = self._over_processes(torch.full_like(values[:, 0], values.shape[1]))
        mean = self._over_processes(values.sum(1)) / count
        squares = self._over_processes((values - mean[:, None]).square().sum(1))
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_((1 / (std + _STD_EPS)).view_as(self.scale))
        self.initialized.fill_(1)
        self._known_initialized = True

    def _over_processes(self, statistic: Tensor) -> Tensor:
        if (
            self.synchronize_init
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            torch.distributed.all_reduce(statistic)
        return statistic

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialized = False

    def extra_repr(self) -> str:
        """Channels and options, for printing."""
        return f"{self.loc.shape[1]}, logdet={self.logdet}"
