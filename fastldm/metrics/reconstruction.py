"""All figures of a first stage over a data set, gathered batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastldm.errors import ConfigError, DataError
from fastldm.losses.perceptual import LPIPS
from fastldm.metrics.codebook import CodebookStatistics
from fastldm.metrics.fid import FrechetInceptionDistance
from fastldm.metrics.image import psnr, ssim


class ReconstructionMetrics:
    """PSNR, SSIM, and where asked for LPIPS, rFID and codebook statistics of reconstructions.

    Args:
        lpips: an `LPIPS` network to measure with.
        fid: a fresh `FrechetInceptionDistance` to measure with.
        codebook_size: number of codes K, for models with a codebook.
    """

    def __init__(
        self,
        *,
        lpips: LPIPS | None = None,
        fid: FrechetInceptionDistance | None = None,
        codebook_size: int | None = None,
    ) -> None:
        self._lpips = lpips
        self._fid = fid
        self._codebook = None if codebook_size is None else CodebookStatistics(codebook_size)
        self._values: dict[str, list[Tensor]] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, indices: Tensor | None = None) -> None:
        """Add images x and their reconstructions, both [B, C, H, W] in [−1, 1].

        Reconstructions are clamped to [−1, 1] first, as they are when they are written to a file.

        Args:
            indices: the codes of the batch, integers of any shape.

        Raises:
            DataError: the shapes differ, or the images are too small for a metric.
            ConfigError: indices are given and `codebook_size` was not, or the other way round.
        """
        if (indices is None) != (self._codebook is None):
            given = "without codebook_size" if self._codebook is None else "but no indices"
            raise ConfigError(f"ReconstructionMetrics: codebook metrics asked for {given}")
        x_hat = x_hat.clamp(-1.0, 1.0)
        batch = {"psnr": psnr(x, x_hat), "ssim": ssim(x, x_hat)}
        if self._lpips is not None:
            batch["lpips"] = self._lpips(x, x_hat).double()
        for name, values in batch.items():
            self._values.setdefault(name, []).append(values.cpu())
        if self._fid is not None:
            self._fid.update_reference(x)
            self._fid.update(x_hat)
        if self._codebook is not None and indices is not None:
            self._codebook.update(indices)
        self.count += x.shape[0]

    def compute(self) -> dict[str, float]:
        """``images`` (their number), ``psnr`` in dB, ``ssim`` and ``lpips``: means over images;
        ``rfid``, ``codebook_usage`` (0…1) and ``codebook_perplexity`` over all of them.

        Raises:
            DataError: no image was added.
        """
        if self.count == 0:
            raise DataError("ReconstructionMetrics: no image was added")
        result: dict[str, float] = {"images": self.count}
        for name, batches in self._values.items():
            values = torch.cat(batches)
            result[name] = math.fsum(values.tolist()) / len(values)
        if self._fid is not None:
            result["rfid"] = self._fid.compute()
        if self._codebook is not None:
            result["codebook_usage"] = self._codebook.usage
            result["codebook_perplexity"] = self._codebook.perplexity
        return result
