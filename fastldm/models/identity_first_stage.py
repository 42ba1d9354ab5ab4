"""The first stage of a diffusion model of pixels: none."""

from __future__ import annotations

from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError, DataError
from fastldm.models.base import ModelMixin
from fastldm.models.first_stage import DecoderOutput
from fastldm.models.vq_model import VQEncoderOutput


class IdentityFirstStage(ModelMixin):
    """Images are their own latents, f = 1: the paper's LDM-1, by CompVis's name.

    It has no weights and is not trained. A `LatentDiffusion` around it is a diffusion model of
    pixels.

    Args:
        latent_channels: channels of the images.
        scaling_factor: the diffusion model sees x · scaling_factor.

    Raises:
        ConfigError: there is less than one channel.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 3, scaling_factor: float = 1.0) -> None:
        super().__init__()
        if latent_channels < 1:
            raise ConfigError(f"latent_channels: expected at least 1, got {latent_channels}")
        self._channels = latent_channels

    @property
    def downsampling_factor(self) -> int:
        """f, 1."""
        return 1

    @property
    def latent_channels(self) -> int:
        """Channels of images and latents."""
        return self._channels

    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Images [B, C, H, W], as ``.latents``.

        Raises:
            DataError: the shape does not fit.
        """
        self._check("images", x)
        return VQEncoderOutput(x) if return_dict else (x,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, C, H, W], as ``.sample``.

        Raises:
            DataError: the shape does not fit.
        """
        self._check("latents", z)
        return DecoderOutput(z) if return_dict else (z,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The images themselves, as ``.sample``."""
        return self.decode(sample, return_dict)

    def _check(self, name: str, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self._channels:
            raise DataError(f"{name}: expected [B, {self._channels}, H, W], got {list(x.shape)}")
