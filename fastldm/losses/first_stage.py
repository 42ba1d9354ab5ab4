"""The loss of the first stage: reconstruction, perceptual, patch-adversarial, KL or codebook.

Equation 25 of the paper (arXiv 2112.10752, appendix G), as CompVis's LPIPSWithDiscriminator and
taming-transformers' VQLPIPSWithDiscriminator compute it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastldm.errors import ConfigError, DataError
from fastldm.losses.adversarial import (
    adaptive_weight,
    adopt_weight,
    hinge_discriminator_loss,
    linear_generator_loss,
    non_saturating_generator_loss,
    value_and_gradient,
    vanilla_discriminator_loss,
    with_gradient,
)
from fastldm.losses.first_stage_config import FirstStageLossConfig
from fastldm.losses.perceptual import LPIPS
from fastldm.losses.reconstruction import pixel_error

__all__ = ["FirstStageLoss", "FirstStageLossConfig"]


class _AdversarialTerm(NamedTuple):
    term: Tensor
    logs: dict[str, Tensor]


class FirstStageLoss(nn.Module):
    """Losses of the autoencoder (generator) and of its discriminator.

    Images and reconstructions are [B, C, H, W] with values in [−1, 1]. Everything is computed in
    float32 (float64 for float64 images) with autocast off, whatever the autoencoder runs in; a
    discriminator that brings its own autocast, as one prepared by Accelerate does, keeps it.

    Two optimisers and accumulation: `generator_loss` leaves no gradient in the discriminator and
    `discriminator_loss` none in the autoencoder, so the two backward passes may come in any order
    and over any number of micro-batches. The adaptive weight is that of each micro-batch; divide
    the returned total, not the inputs, by the number of micro-batches. It comes from
    `torch.autograd.grad` over the last layer alone, which runs no DDP hooks and needs no
    unscaling under a GradScaler: scale the returned total as usual. Give `last_layer` from the
    unwrapped autoencoder. Across processes the weight is that of the global batch. A
    DDP-wrapped discriminator with BatchNorm wants ``broadcast_buffers=False``, because one
    backward pass follows its two forward passes, and SyncBatchNorm for statistics of all ranks.

    Stability: where the discriminator or a gradient becomes NaN or infinite, the generator's total
    leaves the adversarial term out and its gradient with it, and logs ``d_weight_nonfinite`` 1. A
    total is only not finite where the reconstruction, KL or codebook term, or for
    `discriminator_loss` a logit, is.

    The module's only parameter is ``logvar`` (CompVis's key).

    Raises:
        ConfigError: LPIPS is wanted and its backbone cannot be had.
    """

    def __init__(self, config: FirstStageLossConfig | None = None) -> None:
        super().__init__()
        self.config = config or FirstStageLossConfig()
        self.logvar = nn.Parameter(
            torch.tensor(float(self.config.logvar_init)), requires_grad=self.config.learn_logvar
        )
        self.perceptual = (
            LPIPS(
                self.config.perceptual_net,
                self.config.perceptual_weights,
                self.config.perceptual_channels,
            )
            if self.config.perceptual_weight > 0
            else None
        )
        vanilla = self.config.adversarial_loss == "vanilla"
        self._discriminator_loss = (
            vanilla_discriminator_loss if vanilla else hinge_discriminator_loss
        )
        non_saturating = self.config.generator_loss == "non_saturating" or (
            self.config.generator_loss == "auto" and vanilla
        )
        self._generator_loss = (
            non_saturating_generator_loss if non_saturating else linear_generator_loss
        )

    @property
    def uses_discriminator(self) -> bool:
        """Whether any step has an adversarial term."""
        return self.config.discriminator_weight > 0 and self.config.discriminator_factor > 0

    def discriminator_active(self, global_step: int) -> bool:
        """Whether the adversarial losses count at this step; before, both are 0."""
        return self.uses_discriminator and global_step >= self.config.discriminator_start

    def forward(
        self, inputs: Tensor, reconstructions: Tensor, **arguments: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`generator_loss`."""
        return self.generator_loss(inputs, reconstructions, **arguments)

    def generator_loss(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        *,
        global_step: int,
        discriminator: nn.Module | None = None,
        last_layer: Tensor | None = None,
        posterior_kl: Tensor | None = None,
        codebook_loss: Tensor | None = None,
        commitment_loss: Tensor | None = None,
        perplexity: Tensor | None = None,
        usage: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's loss, a scalar, and detached scalars to log.

        Args:
            inputs: images [B, C, H, W] in [−1, 1].
            reconstructions: the decoder's output with its graph, same shape.
            global_step: optimiser steps done so far.
            discriminator: needed from `discriminator_start` on; may be wrapped by DDP.
            last_layer: weight of the decoder's last layer, for the adaptive weight.
            posterior_kl: KL divergence per sample [B], summed over the latent.
            codebook_loss: mean (sg[z] − e)², unweighted, a scalar.
            commitment_loss: mean (z − sg[e])², unweighted, a scalar.
            perplexity: codebook perplexity, only logged.
            usage: share of the codebook in use, only logged.

        Returns:
            the total, and logs: ``total``, ``rec`` and ``perceptual`` (means over values and over
            images, unweighted), ``nll``, ``logvar``; ``kl``, ``codebook``, ``commitment``,
            ``perplexity``, ``usage`` where given; and, where a discriminator is configured,
            ``g_loss``, ``logits_fake``, ``disc_factor``, ``d_weight``, ``d_weight_nonfinite``,
            ``grad_norm_rec`` and ``grad_norm_adv``, all 0 before it starts.

        Raises:
            DataError: inputs and reconstructions are not batches of images of one shape.
            ConfigError: the discriminator has started and it or `last_layer` is not given.
            TrainingError: `last_layer` has no part in the reconstructions.
        """
        _check_images(inputs, reconstructions)
        with torch.autocast(inputs.device.type, enabled=False):
            target = _full_precision(inputs.detach())
            image = _full_precision(reconstructions)
            nll, nll_gradient, logs = self._nll(target, image, sums=posterior_kl is not None)
            total = nll
            if posterior_kl is not None:
                kl = _full_precision(posterior_kl).mean()
                total = total + self.config.kl_weight * kl
                logs["kl"] = kl
            terms = {"codebook": codebook_loss, "commitment": commitment_loss}
            for name, term in terms.items():
                if term is not None:
                    value = _full_precision(term).mean()
                    beta_here = (name == "codebook") == self.config.legacy
                    weight = self.config.commitment_weight if beta_here else 1.0
                    total = total + self.config.codebook_weight * weight * value
                    logs[name] = value
            if self.uses_discriminator:
                adversarial = self._adversarial(
                    image, nll_gradient, discriminator, last_layer, global_step
                )
                total = total + adversarial.term
                logs |= adversarial.logs
        passed = {"perplexity": perplexity, "usage": usage}
        logs |= {name: value for name, value in passed.items() if value is not None}
        return total, _detached({"total": total, **logs}, total)

    def discriminator_loss(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        *,
        discriminator: nn.Module,
        global_step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, a scalar, and detached scalars to log.

        Before `discriminator_start` the loss is 0 with zero gradients; a trainer saves that work
        by asking `discriminator_active`.

        Args:
            inputs: images [B, C, H, W] in [−1, 1].
            reconstructions: the decoder's output, same shape; no gradient goes into it.
            discriminator: maps images to logits of any shape; may be wrapped by DDP.
            global_step: optimiser steps done so far.

        Returns:
            the total and the logs ``disc_loss, disc_factor, logits_real, logits_fake``.

        Raises:
            DataError: inputs and reconstructions are not batches of images of one shape.
        """
        _check_images(inputs, reconstructions)
        with torch.autocast(inputs.device.type, enabled=False):
            logits_real = _logits(discriminator, inputs.detach())
            logits_fake = _logits(discriminator, reconstructions.detach())
            factor = self._factor(global_step)
            total = factor * self._discriminator_loss(logits_real, logits_fake)
        return total, _detached(
            {
                "disc_loss": total,
                "disc_factor": factor,
                "logits_real": logits_real.mean(),
                "logits_fake": logits_fake.mean(),
            },
            total,
        )

    def _factor(self, global_step: int) -> float:
        return adopt_weight(
            self.config.discriminator_factor, global_step, self.config.discriminator_start
        )

    def _nll(
        self, target: Tensor, image: Tensor, *, sums: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """(pixel + w·LPIPS) / exp(logvar) + logvar, its gradient by `image`, and its parts."""

        def mean_error(y: Tensor) -> tuple[Tensor, Tensor]:
            rec = pixel_error(self.config.reconstruction, target, y)
            if self.perceptual is None:
                return rec, torch.stack([rec, torch.zeros_like(rec)])
            perceptual = self.perceptual(target, y).mean()
            return rec + self.config.perceptual_weight * perceptual, torch.stack([rec, perceptual])

        reduction = self.config.reduction
        if reduction == "auto":
            reduction = "sum_per_sample" if sums else "mean"
        values = image[0].numel() if reduction == "sum_per_sample" else 1
        logvar = self.logvar.to(image.dtype)
        gradient = None
        if _differentiable(image):
            error, parts, error_gradient = value_and_gradient(mean_error, image)
            error = with_gradient(error, image, error_gradient)
            gradient = error_gradient * (values * torch.exp(-logvar.detach()))
        else:
            error, parts = mean_error(image)
        nll = (error * torch.exp(-logvar) + logvar) * values
        rec, perceptual = parts.unbind()
        return nll, gradient, {"rec": rec, "perceptual": perceptual, "nll": nll, "logvar": logvar}

    def _adversarial(
        self,
        image: Tensor,
        nll_gradient: Tensor | None,
        discriminator: nn.Module | None,
        last_layer: Tensor | None,
        global_step: int,
    ) -> _AdversarialTerm:
        zero = torch.zeros((), dtype=image.dtype, device=image.device)
        factor = self._factor(global_step)
        logs = dict.fromkeys(("g_loss", "logits_fake", "d_weight", "d_weight_nonfinite"), zero) | {
            "disc_factor": zero + factor,
            "grad_norm_rec": zero,
            "grad_norm_adv": zero,
        }
        if factor == 0:
            return _AdversarialTerm(zero, logs)
        if discriminator is None:
            raise ConfigError(
                f"discriminator: needed from step {self.config.discriminator_start} "
                "(discriminator_start) on; give one, or set discriminator_weight: 0"
            )
        # DDP would wait for a backward pass through the discriminator that never comes.
        network = (
            discriminator.module
            if isinstance(discriminator, DistributedDataParallel)
            else discriminator
        )

        def game(y: Tensor) -> tuple[Tensor, Tensor]:
            logits = _logits(network, y)
            return self._generator_loss(logits), logits.mean()

        if nll_gradient is None:
            with torch.no_grad():
                logs["g_loss"], logs["logits_fake"] = game(image)
            if self.config.adaptive_weight:
                return _AdversarialTerm(zero, logs)
            logs["d_weight"] = zero + self.config.discriminator_weight
            return _AdversarialTerm(factor * logs["d_weight"] * logs["g_loss"], logs)

        g_loss, logits_fake, gradient = value_and_gradient(game, image)
        finite = torch.isfinite(g_loss) & torch.isfinite(gradient).all()
        weight = torch.full_like(zero, self.config.discriminator_weight)
        if last_layer is not None:
            balance = adaptive_weight(image, last_layer, nll_gradient, gradient)
            logs["grad_norm_rec"] = balance.grad_norm_rec
            logs["grad_norm_adv"] = balance.grad_norm_adv
            if self.config.adaptive_weight:
                finite = finite & balance.finite
                weight = weight * balance.weight
        elif self.config.adaptive_weight:
            raise ConfigError(
                "last_layer: the adaptive weight needs the weight of the decoder's last layer "
                "(model.last_layer); give it, or set adaptive_weight: false"
            )
        weight = torch.where(finite, weight, 0.0)
        term = with_gradient(
            torch.where(finite, g_loss, 0.0), image, torch.where(finite, gradient, 0.0)
        )
        logs["g_loss"], logs["logits_fake"], logs["d_weight"] = g_loss, logits_fake, weight
        logs["d_weight_nonfinite"] = (~finite).to(zero.dtype)
        return _AdversarialTerm(weight * factor * term, logs)


def _differentiable(image: Tensor) -> bool:
    return torch.is_grad_enabled() and image.requires_grad


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logits(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Logits in full precision; the images are given the dtype of the discriminator's weights."""
    weight = next(discriminator.parameters(), None)
    dtype = images.dtype if weight is None else weight.dtype
    logits: Tensor = discriminator(images.to(dtype))
    return _full_precision(logits)


def _check_images(inputs: Tensor, reconstructions: Tensor) -> None:
    if inputs.ndim != 4 or inputs.shape != reconstructions.shape or inputs.shape[0] == 0:
        raise DataError(
            "inputs and reconstructions: expected two batches [B, C, H, W] of one shape, got "
            f"{list(inputs.shape)} and {list(reconstructions.shape)}"
        )


def _detached(logs: Mapping[str, Tensor | float], like: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        for name, value in logs.items()
    }
