"""Pieces of sampling and training of one spec, to be called and timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

from fastldm import ops
from fastldm.profiling.families import UPDATE_RANGE
from fastldm.profiling.specs import LDMSpec
from fastldm.schedulers import DDIMScheduler

Call = Callable[[], object]

BACKENDS = {"fused": "auto", "eager": "reference"}
"""What is compared: fastldm's kernels where they serve, and plain torch."""

_STEPS = 50
_STEP_IN_THE_MIDDLE = 25


class Sampling:
    """The parts of drawing images: a denoising step and decoding.

    Args:
        spec: the models, which are built with random weights.
        device, dtype: of weights and latents.
    """

    def __init__(self, spec: LDMSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec, self._device, self._dtype = spec, device, dtype
        self._unet = spec.build_unet(device).to(dtype).eval()
        self._first_stage = spec.build_first_stage(device)
        if self._first_stage is not None:
            self._first_stage = self._first_stage.to(dtype).eval()
        self._scheduler = DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
        )
        self._scheduler.set_timesteps(_STEPS, device=device)

    @property
    def held_bytes(self) -> int:
        """Of all weights."""
        return _nbytes(self._unet) + _nbytes(self._first_stage)

    def step(self, batch_size: int, backend: str = "fused") -> Call:
        """One denoising step: the UNet, and DDIM's update."""
        inputs = self._spec.unet_inputs(batch_size, self._device, self._dtype)
        timestep = self._scheduler.timesteps[_STEP_IN_THE_MIDDLE]

        def update(output: torch.Tensor) -> None:
            with record_function(UPDATE_RANGE):
                self._scheduler.step(output, timestep, inputs[0], return_original=False)

        return _without_gradient(lambda: update(self._unet(*inputs).sample), backend)

    def decode(self, batch_size: int, backend: str = "fused") -> Call | None:
        """Latents to images; None for f = 1."""
        first_stage = self._first_stage
        if first_stage is None:
            return None
        z = self._spec.unet_inputs(batch_size, self._device, self._dtype)[0]
        return _without_gradient(lambda: first_stage.decode(z), backend)

    def encode(self, batch_size: int, backend: str = "fused") -> Call | None:
        """Images to latents; None for f = 1."""
        first_stage = self._first_stage
        if first_stage is None:
            return None
        images = self._spec.images(batch_size, self._device, self._dtype)
        return _without_gradient(lambda: first_stage.encode(images), backend)


class Training:
    """A training step of the UNet on latents: loss (paper, eq. 2), gradients, Adam's update.

    Weights are in float32; a half precision is used through autocast.
    """

    def __init__(self, spec: LDMSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec, self._device, self._dtype = spec, device, dtype
        self._unet = spec.build_unet(device)
        self._optimizer = torch.optim.AdamW(self._unet.parameters(), lr=1e-6)

    @property
    def held_bytes(self) -> int:
        """Of weights, gradients and moments."""
        states = self._optimizer.state.values()
        moments = sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor))
        gradients = sum(p.grad.nbytes for p in self._unet.parameters() if p.grad is not None)
        return _nbytes(self._unet) + gradients + moments

    def step(self, batch_size: int, backend: str = "fused") -> Call:
        """One training step on noised latents."""
        z, *rest = self._spec.unet_inputs(batch_size, self._device)
        noise = torch.randn_like(z)

        def step() -> None:
            with ops.backend(BACKENDS[backend]):
                with self._autocast():
                    loss = F.mse_loss(self._unet(z, *rest).sample.float(), noise)
                loss.backward()
                with record_function(UPDATE_RANGE):
                    self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=False)

        return step

    def _autocast(self) -> AbstractContextManager[None]:
        is_half = self._dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self._device.type, self._dtype if is_half else None, enabled=is_half)


def _without_gradient(work: Callable[[], object], backend: str) -> Call:
    def call() -> object:
        with torch.inference_mode(), ops.backend(BACKENDS[backend]):
            return work()

    return call


def _nbytes(module: nn.Module | None) -> int:
    return 0 if module is None else sum(weight.nbytes for weight in module.parameters())
