"""Principal components of whole images: the linear baseline of an autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor


class PrincipalComponents:
    """Principal components of training images, all that they span.

    Args:
        images: [N, C, H, W].
    """

    def __init__(self, images: Tensor) -> None:
        flat = images.flatten(1).double()
        self._shape = images.shape[1:]
        self._mean = flat.mean(0)
        _, _, directions = torch.linalg.svd(flat - self._mean, full_matrices=False)
        # Centred, N images span at most N − 1 directions.
        self._directions = directions[: len(images) - 1]

    def components(self, numbers: int) -> int:
        """How many of so many components there are."""
        return min(numbers, len(self._directions))

    def reconstruct(self, images: Tensor, numbers: int) -> Tensor:
        """Images [B, C, H, W] from their coefficients of the first `numbers` components."""
        directions = self._directions[:numbers]
        coefficients = (images.flatten(1).double() - self._mean) @ directions.T
        flat = self._mean + coefficients @ directions
        return flat.view(-1, *self._shape).to(images)
