"""What the models of one f cost: counted on the meta device, whatever the machine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops
from fastldm.models import VQModel
from fastldm.profiling.counting import Cost, count
from fastldm.profiling.specs import FirstStage, LDMSpec, UNet, parameters_of

_ADAM_OPERANDS = 7
"""Weight, gradient and two moments are read, all but the gradient written."""
_TRAINED_COPIES = 4
"""Weight, gradient and two moments."""
_COEFFICIENTS_OF_DDIM = 5

_unets: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class LDMCosts:
    """Costs for one image; all but `step_eager` with fastldm's operators.

    Attributes:
        parameters, first_stage_parameters: numbers of weights.
        latent_shape: channels, height, width.
        element_size: bytes of a number.
        step, step_eager: one denoising step: the UNet, and the sampler's update.
        train: forward, backward and Adam's update from a latent; the update is that
            of a whole batch.
        encode, decode: of the first stage; nothing for f = 1.
    """

    parameters: int
    first_stage_parameters: int
    latent_shape: tuple[int, int, int]
    element_size: int
    step: Cost
    step_eager: Cost
    train: Cost
    encode: Cost
    decode: Cost

    def sample(self, steps: int) -> Cost:
        """Of one image: `steps` denoising steps, and decoding."""
        return self.step.times(steps) + self.decode

    def train_from_image(self) -> Cost:
        """Of one image that is encoded first, rather than read from a latent cache."""
        return self.encode + self.train

    def sampling_memory(self, batch_size: int) -> int:
        """Bytes that sampling a batch needs, weights included, without the allocator's share."""
        weights = (self.parameters + self.first_stage_parameters) * self.element_size
        return weights + batch_size * max(self.step.peak_bytes, self.decode.peak_bytes)

    def training_memory(self, batch_size: int) -> int:
        """Bytes that a training step on latents needs: weights, gradients, moments, activations."""
        # What the backward pass makes is in the count, too: one copy, the gradients.
        states = (_TRAINED_COPIES - 1) * self.parameters * self.element_size
        weights = self.parameters * self.element_size
        return states + weights + batch_size * max(self.train.peak_bytes - weights, 0)

    def as_dict(self, steps: int) -> dict[str, Any]:
        """For JSON."""
        return {
            "parameters": self.parameters,
            "first_stage_parameters": self.first_stage_parameters,
            "latent_shape": list(self.latent_shape),
            "step": self.step.as_dict(),
            "step_eager": self.step_eager.as_dict(),
            "encode": self.encode.as_dict(),
            "decode": self.decode.as_dict(),
            "sample": self.sample(steps).as_dict(),
            "train_from_cache": self.train.as_dict(),
            "train_from_image": self.train_from_image().as_dict(),
            "sampling_memory": self.sampling_memory(1),
            "training_memory": self.training_memory(1),
        }


def ldm_costs(spec: LDMSpec, dtype: torch.dtype = torch.float32) -> LDMCosts:
    """Count what the models of `spec` cost in `dtype`, for one image."""
    first_stage = spec.build_first_stage("meta")
    encode = decode = Cost()
    if first_stage is not None:
        first_stage = first_stage.to(dtype)
        encode = count_encoding(first_stage, spec.images(1, "meta", dtype))
        decode = count_decoding(first_stage, spec.unet_inputs(1, "meta", dtype)[0])
    # A first stage of the other kind with as many channels has the same UNet.
    key = json.dumps([spec.conditioning, spec.latent_shape, spec.unet_config(), str(dtype)])
    if key not in _unets:
        unet, inputs = spec.build_unet("meta").to(dtype), spec.unet_inputs(1, "meta", dtype)
        _unets[key] = {
            "parameters": parameters_of(unet),
            "step": count_step(unet, inputs, fused=True),
            "step_eager": count_step(unet, inputs, fused=False),
            "train": count_training(unet, inputs, fused=True),
        }
    return LDMCosts(
        first_stage_parameters=parameters_of(first_stage),
        latent_shape=spec.latent_shape,
        element_size=torch.empty(0, dtype=dtype).element_size(),
        encode=encode,
        decode=decode,
        **_unets[key],
    )


def count_step(unet: UNet, inputs: tuple[Tensor, ...], *, fused: bool) -> Cost:
    """A denoising step of a UNet on the meta device, with DDIM's update."""
    coefficients = torch.empty(_COEFFICIENTS_OF_DDIM, device="meta")

    def update() -> None:
        ops.ddim_step(inputs[0], inputs[0], coefficients, return_original=False)

    with torch.no_grad():
        forward = count(lambda: unet(*inputs), fused=fused)
        changed = count(update, fused=fused)
    moved = Counter({"update": changed.total_bytes})
    return forward + Cost(bytes=moved, peak_bytes=changed.peak_bytes)


def count_training(unet: UNet, inputs: tuple[Tensor, ...], *, fused: bool) -> Cost:
    """Forward, backward and Adam's update of a UNet on the meta device."""

    def step() -> None:
        F.mse_loss(unet(*inputs).sample, inputs[0]).backward()

    unet.requires_grad_(True)
    cost = count(step, fused=fused)
    unet.zero_grad(set_to_none=True)
    weights = sum(weight.numel() * weight.element_size() for weight in unet.parameters())
    return cost + Cost(bytes=Counter({"update": _ADAM_OPERANDS * weights}))


@torch.no_grad()
def count_encoding(first_stage: FirstStage, images: Tensor, *, fused: bool = True) -> Cost:
    """Images to latents."""
    return count(lambda: first_stage.encode(images, return_dict=False), fused=fused)


@torch.no_grad()
def count_decoding(first_stage: FirstStage, z: Tensor, *, fused: bool = True) -> Cost:
    """Latents to images, with the lookup where there is a codebook."""
    if not isinstance(first_stage, VQModel):
        return count(lambda: first_stage.decode(z), fused=fused)
    codebook = first_stage.quantize.embedding.weight

    def decode() -> None:
        # Not by the quantiser itself, whose autocast region the meta device does not know.
        first_stage.decode(ops.vector_quantize(z, codebook).z_q, force_not_quantize=True)

    return count(decode, fused=fused)
