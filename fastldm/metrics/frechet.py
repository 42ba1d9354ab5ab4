"""Fréchet distance between Gaussians of image features (Heusel et al. 2017, arXiv 1706.08500).

With torch-fidelity's Inception features it is the FID and has a class of its own
(`fastldm.metrics.FrechetInceptionDistance`); with any other features it is a number of its own,
which only says which of several sets of images is nearer by those features and is never called FID.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import DataError

_SMALLEST_SPREAD = 1e-6
"""Features whose standard deviation is a smaller share of the largest one are left out."""


class RunningGaussian:
    """Mean and covariance of feature vectors that come in batches (Chan et al. 1979), float64.

    Args:
        size: length D of a vector.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add vectors [B, D], float64."""
        added = features.shape[0]
        if added == 0:
            return
        mean = features.mean(0)
        centred = features - mean
        shift = mean - self.mean
        total = self.count + added
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(shift, shift) * (self.count * added / total)
        self.mean += shift * (added / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [D, D]; of at least two vectors."""
        return self.scatter / (self.count - 1)

    def statistics(self) -> dict[str, Any]:
        """Both as torch-fidelity takes them."""
        return {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}


def frechet_distance(
    mean: Tensor, covariance: Tensor, mean_2: Tensor, covariance_2: Tensor
) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½), the squared 2-Wasserstein distance of two Gaussians.

    Args:
        mean, mean_2: [D], float64.
        covariance, covariance_2: [D, D], float64, symmetric and not negative.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of Σ₁Σ₂ are those of the symmetric Σ₁^½·Σ₂·Σ₁^½.
    products = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0)
    traces = covariance.trace() + covariance_2.trace() - 2 * products.sqrt().sum()
    return float((mean - mean_2).square().sum() + traces)


class FrechetFeatureDistance:
    """Fréchet distance of image features to those of reference images.

    Each feature is divided by its standard deviation over the reference images, so that all count
    alike. Features that are constant there are left out.

    Args:
        features: from images [B, C, H, W] in [−1, 1] to vectors [B, D].
    """

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self._features = features
        self._reference: RunningGaussian | None = None

    def update_reference(self, images: Tensor) -> None:
        """Add reference images [B, C, H, W] in [−1, 1]."""
        vectors = self._vectors(images)
        if self._reference is None:
            self._reference = RunningGaussian(vectors.shape[1])
        self._reference.update(vectors)

    def to(self, images: Tensor, batch_size: int = 64) -> float:
        """The distance of images [N, C, H, W]; it has a bias that shrinks with N.

        Raises:
            DataError: one side has fewer than two images, or the reference images are all alike.
        """
        reference = self._reference
        for name, count in (
            ("reference", 0 if reference is None else reference.count),
            ("compared", len(images)),
        ):
            if count < 2:
                raise DataError(f"feature distance: {count} {name} images; at least 2 are needed")
        assert reference is not None
        compared = RunningGaussian(len(reference.mean))
        for batch in images.split(batch_size):
            compared.update(self._vectors(batch))
        spread = reference.covariance.diagonal().sqrt()
        used = spread > _SMALLEST_SPREAD * spread.max()
        if not used.any():
            raise DataError("feature distance: the reference images all have the same features")
        scale = spread[used]
        sides = []
        for side in (reference, compared):
            covariance = side.covariance[used][:, used] / torch.outer(scale, scale)
            sides += [side.mean[used] / scale, covariance]
        return frechet_distance(*sides)

    @torch.no_grad()
    def _vectors(self, images: Tensor) -> Tensor:
        return self._features(images.clamp(-1.0, 1.0)).double().cpu()
