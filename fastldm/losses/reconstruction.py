"""Errors between an image and its reconstruction, pixel by pixel."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reconstruction = Literal["l1", "l2", "bce"]

_BCE_MARGIN = 0.5 / 255


def pixel_error(reconstruction: Reconstruction, target: Tensor, image: Tensor) -> Tensor:
    """Mean error per value of images [B, C, H, W] in [−1, 1], a scalar."""
    if reconstruction == "l1":
        return F.l1_loss(image, target)
    if reconstruction == "l2":
        return F.mse_loss(image, target)
    return bernoulli_error(target, image)


def bernoulli_error(target: Tensor, image: Tensor) -> Tensor:
    """Mean binary cross-entropy in nats of images with values in [−1, 1], a scalar.

    Values become probabilities p = (x̂ + 1) / 2 and targets t = (x + 1) / 2 (Kingma and Welling
    2013, appendix C); with a tanh as the decoder's last activation, p is the sigmoid of twice its
    logit. A decoder without one may leave [0, 1]: p is held half an 8-bit level inside, and beyond
    that the gradient is the one at the border where it points back, and 0 where it points out.
    """
    t = (target + 1) / 2
    p = (image + 1) / 2
    held = p.clamp(_BCE_MARGIN, 1 - _BCE_MARGIN)
    points_back = (held - t) * (p - held) >= 0
    p = torch.where(points_back, held.detach() + (p - p.detach()), held.detach())
    # Not F.binary_cross_entropy: on a CUDA device it stops the whole process at a NaN.
    return -(t * p.log() + (1 - t) * torch.log1p(-p)).mean()
