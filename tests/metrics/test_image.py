"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastldm.errors import DataError
from fastldm.metrics import psnr, ssim


def pair(
    channels: int = 3, height: int = 24, width: int = 17, noise: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.linspace(-1, 1, height, dtype=torch.float64).view(1, 1, -1, 1)
    x = rows * torch.randn(3, channels, 1, width, generator=generator, dtype=torch.float64)
    y = x + noise * torch.randn(3, channels, height, width, generator=generator).double()
    return x.clamp(-1, 1), y.clamp(-1, 1)


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_psnr_is_scikit_images(data_range: float) -> None:
    x, y = (image * data_range / 2 for image in pair())
    expected = [
        peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=data_range)
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(psnr(x, y, data_range=data_range), expected, rtol=1e-12)


def test_psnr_of_a_known_error() -> None:
    x = torch.zeros(1, 3, 4, 4)
    assert psnr(x, x + 0.2).item() == pytest.approx(20.0, abs=1e-5)
    assert psnr(x, x).item() == math.inf


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(11, 11), (24, 17), (40, 33)])
def test_ssim_is_scikit_images(channels: int, size: tuple[int, int]) -> None:
    x, y = pair(channels, *size)
    expected = [
        structural_similarity(
            a.numpy(),
            b.numpy(),
            data_range=2.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-10, atol=1e-12)


def test_ssim_of_equal_images_is_one_also_far_from_zero() -> None:
    x, _ = pair()
    torch.testing.assert_close(ssim(x, x), torch.ones(3).double(), rtol=0, atol=1e-12)
    far = (x * 1e-3 + 1e4).float()
    torch.testing.assert_close(ssim(far, far), torch.ones(3).double(), rtol=0, atol=1e-9)


def test_half_precision_images_are_measured_exactly() -> None:
    x, y = (image.bfloat16() for image in pair())
    torch.testing.assert_close(psnr(x, y), psnr(x.double(), y.double()), rtol=0, atol=0)
    torch.testing.assert_close(ssim(x, y), ssim(x.double(), y.double()), rtol=0, atol=0)


def test_bad_shapes_are_named() -> None:
    x, y = pair()
    for metric in (psnr, ssim):
        with pytest.raises(DataError, match=r"of one shape, got \[3, 3, 24, 17\] and \[2, 3"):
            metric(x, y[:2])
        with pytest.raises(DataError, match=r"\[B, C, H, W\]"):
            metric(x[0], y[0])
    with pytest.raises(DataError, match="11×11 or larger, got 24×10"):
        ssim(x[..., :10], y[..., :10])
