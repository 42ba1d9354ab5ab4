"""The accumulator gives what its metrics give over all images at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastldm.errors import ConfigError, DataError
from fastldm.metrics import (
    FrechetInceptionDistance,
    ReconstructionMetrics,
    codebook_perplexity,
    codebook_usage,
    psnr,
    ssim,
)
from fastldm.metrics import fid as fid_module


class Brightness(torch.nn.Module):
    """Stands for LPIPS and for Inception."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None):
        if y is not None:
            return (x - y).abs().mean((1, 2, 3))
        return (x.flatten(1)[:, :64].float(),)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(7, 3, 16, 16, generator=generator) * 2 - 1
    x_hat = x + 0.4 * torch.randn(7, 3, 16, 16, generator=generator)
    return x, x_hat, torch.randint(0, 20, (7, 4, 4), generator=generator)


def test_all_metrics_over_uneven_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid_module, "_build_inception", lambda *_: Brightness())
    x, x_hat, indices = batch()
    metrics = ReconstructionMetrics(
        lpips=Brightness(),  # type: ignore[arg-type]
        fid=FrechetInceptionDistance(features=64),
        codebook_size=32,
    )
    for part in (slice(0, 4), slice(4, 7)):
        metrics.update(x[part], x_hat[part], indices[part])
    result = metrics.compute()
    clamped = x_hat.clamp(-1, 1)
    assert result["images"] == 7
    assert result["psnr"] == pytest.approx(psnr(x, clamped).mean().item(), rel=1e-12)
    assert result["ssim"] == pytest.approx(ssim(x, clamped).mean().item(), rel=1e-12)
    assert result["lpips"] == pytest.approx((x - clamped).abs().mean().item(), rel=1e-6)
    assert result["codebook_usage"] == codebook_usage(indices, 32)
    assert result["codebook_perplexity"] == pytest.approx(codebook_perplexity(indices, 32))
    fid = FrechetInceptionDistance(features=64)
    fid.update_reference(x)
    fid.update(clamped)
    assert result["rfid"] == pytest.approx(fid.compute(), rel=1e-6)


def test_only_what_was_asked_for() -> None:
    x, x_hat, _ = batch()
    metrics = ReconstructionMetrics()
    metrics.update(x.requires_grad_(), x_hat)
    assert set(metrics.compute()) == {"images", "psnr", "ssim"}


def test_lpips_as_a_metric(tmp_path: Path) -> None:
    import torchvision

    from fastldm.metrics import LPIPS

    path = tmp_path / "squeeze.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    network, (x, x_hat, _) = LPIPS("squeeze", path), batch()
    x, x_hat = (image.repeat(1, 1, 2, 2) for image in (x, x_hat))
    metrics = ReconstructionMetrics(lpips=network)
    metrics.update(x, x_hat)
    expected = network(x, x_hat.clamp(-1, 1)).mean().item()
    assert metrics.compute()["lpips"] == pytest.approx(expected, rel=1e-6)


def test_bad_use_is_named() -> None:
    x, x_hat, indices = batch()
    with pytest.raises(DataError, match="no image was added"):
        ReconstructionMetrics().compute()
    with pytest.raises(ConfigError, match="codebook metrics asked for without codebook_size"):
        ReconstructionMetrics().update(x, x_hat, indices)
    with pytest.raises(ConfigError, match="but no indices"):
        ReconstructionMetrics(codebook_size=8).update(x, x_hat)
