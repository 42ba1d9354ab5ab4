"""PSNR and SSIM between batches of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import DataError

_WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def psnr(x: Tensor, y: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, float64 [B]; infinite for equal images.

    Args:
        x: images [B, C, H, W].
        y: their reconstructions, same shape.
        data_range: largest minus smallest possible value, 2 for images in [−1, 1].

    Raises:
        DataError: the shapes are not batches of images of one shape.
    """
    x, y = _checked(x, y)
    error = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(x: Tensor, y: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), float64 [B].

    An 11×11 Gaussian window of σ = 1.5 inside the image, K = (0.01, 0.03), biased covariances;
    the mean over positions and channels. This is scikit-image's `structural_similarity` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``.

    Args:
        x: images [B, C, H, W], H and W at least 11.
        y: their reconstructions, same shape.
        data_range: largest minus smallest possible value, 2 for images in [−1, 1].

    Raises:
        DataError: the shapes are not batches of images of one shape, or the images are too small.
    """
    x, y = _checked(x, y)
    if min(x.shape[2:]) < _WINDOW:
        raise DataError(
            f"SSIM: images must be {_WINDOW}×{_WINDOW} or larger, got {x.shape[2]}×{x.shape[3]}"
        )
    # The middle of the range taken away first: variances then lose no digits to the mean.
    centre = (x.mean((2, 3), keepdim=True) + y.mean((2, 3), keepdim=True)) / 2
    dx, dy = x - centre, y - centre
    mean_x, mean_y = _blur(dx), _blur(dy)
    variance_x = _blur(dx * dx) - mean_x.square()
    variance_y = _blur(dy * dy) - mean_y.square()
    covariance = _blur(dx * dy) - mean_x * mean_y
    mean_x, mean_y = mean_x + centre, mean_y + centre
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of x [B, C, H, W] over each window wholly inside the image."""
    offsets = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    window = torch.exp(-0.5 * (offsets / _SIGMA).square())
    window = window / window.sum()
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    return planes.view(*x.shape[:2], *planes.shape[2:])


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or x.shape != y.shape:
        raise DataError(
            f"expected two batches of images [B, C, H, W] of one shape, got {list(x.shape)} "
            f"and {list(y.shape)}"
        )
    return x.detach().double(), y.detach().double()
