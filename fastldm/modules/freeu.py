"""FreeU: stronger backbone, weaker low frequencies of the skips (https://arxiv.org/abs/2309.11497).

Both factors only apply to the two lowest resolutions of the way up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreeU:
    """The factors for one level of the way up.

    Attributes:
        backbone: of the first half of the channels that come from below.
        skip: of the lowest frequencies of the feature maps of the way down.
    """

    backbone: float
    skip: float

    def __call__(self, hidden_states: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
        """Both inputs of a residual block, [B, C, H, W] each, scaled."""
        half = hidden_states.shape[1] // 2
        scaled = torch.cat(
            [self.backbone * hidden_states[:, :half], hidden_states[:, half:]], dim=1
        )
        return scaled, scale_low_frequencies(skipped, self.skip)


def scale_low_frequencies(x: Tensor, factor: float) -> Tensor:
    """x [B, C, H, W] with the frequencies −1 and 0 along both axes multiplied by `factor`."""
    height, width = x.shape[-2:]
    row, column = height // 2, width // 2
    # Half precision has no transform for most sizes.
    values = x if x.dtype in (torch.float32, torch.float64) else x.float()
    spectrum = torch.fft.fftshift(torch.fft.fftn(values, dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones((height, width), dtype=values.dtype, device=x.device)
    mask[max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1] = factor
    spectrum = torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))
    return torch.fft.ifftn(spectrum, dim=(-2, -1)).real.to(x.dtype)
