"""The latent space of a frozen first stage: encode, decode and the scale of z."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.errors import DataError
from fastldm.latent_diffusion.parts import latent_channels_of
from fastldm.latent_diffusion.scale import LatentScale
from fastldm.models.base import ModelMixin
from fastldm.schedulers import randn


class LatentSpace(nn.Module):
    """A first stage, whose parameters are frozen, and the scale of its latents.

    Args:
        first_stage: `AutoencoderKL` or `VQModel`.
        scaling_factor, latent_mean, latent_std: by default those of the first stage's config.

    Attributes:
        latent_channels: C.
        latent_scale: from the first stage's latents to z.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        scaling_factor: float | None = None,
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.first_stage: Any = first_stage.requires_grad_(False).eval()
        self.latent_channels = latent_channels_of(first_stage)
        self.set_scale(
            LatentScale.of(
                self.latent_channels,
                self.first_stage.config,
                scaling_factor,
                latent_mean,
                latent_std,
            )
        )

    def set_scale(self, scale: LatentScale) -> None:
        """Take over the map from latents to z, here and in the first stage's config."""
        self.latent_scale = scale
        config = self.first_stage.config
        fields = {
            "scaling_factor": scale.factor,
            "latents_mean": None if scale.mean is None else list(scale.mean),
            "latents_std": None if scale.std is None else list(scale.std),
            "shift_factor": scale.shift or None,
        }
        changed = {
            name: value
            for name, value in fields.items()
            if name in config and config[name] != value
        }
        if changed:
            own = isinstance(self.first_stage, ModelMixin)
            register = "register_config" if own else "register_to_config"
            getattr(self.first_stage, register)(**changed)

    @torch.no_grad()
    def calibrate_scale(
        self,
        latents: Tensor | None = None,
        *,
        images: Tensor | None = None,
        per_channel: bool = False,
    ) -> None:
        """Set the scale from a batch, so that z has standard deviation 1 (paper, appendix G).

        Args:
            latents: as `encode_raw` gives them, [B, C, h, w]; or
            images: [B, channels, H, W] in [−1, 1].
            per_channel: give each channel mean 0 and standard deviation 1, rather than divide all
                by one standard deviation. That wants more than one batch of latents.

        Raises:
            DataError: neither or both are given, or the standard deviation is 0 or not finite.
        """
        if (latents is None) == (images is None):
            raise DataError("latents, images: give one of them")
        if images is not None:
            latents = self.encode_raw(images)
        assert latents is not None
        self._check_latents(latents)
        self.set_scale(LatentScale.calibrated(latents, per_channel))

    def encode_raw(
        self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Latents as the first stage gives them, not scaled.

        Args:
            images: [B, channels, H, W] in [−1, 1].
            generator: draws the sample of the posterior: one, or a list with one an image.

        Returns:
            [B, C, H/f, W/f]: a sample of the posterior, or the latent before quantisation.
        """
        output = self.first_stage.encode(images.to(dtype_of(self.first_stage)))
        if hasattr(output, "latents"):
            return output.latents
        posterior = output.latent_dist
        if not isinstance(generator, Sequence):
            return posterior.sample(generator)
        mean = posterior.mean
        return mean + posterior.std * randn(mean.shape, generator, mean.device, mean.dtype)

    def encode(
        self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Images [B, channels, H, W] in [−1, 1] → z [B, C, H/f, W/f]; see `encode_raw`."""
        return self.latent_scale.apply(self.encode_raw(images, generator))

    def decode(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] → images [B, channels, h·f, w·f], about in [−1, 1]; VQ quantises first."""
        raw = self.latent_scale.invert(z)
        return self.first_stage.decode(raw.to(dtype_of(self.first_stage))).sample

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise DataError(f"z: expected [B, {self.latent_channels}, h, w], got {list(z.shape)}")


def dtype_of(module: nn.Module) -> torch.dtype:
    """Dtype of a module's first parameter, torch's default where it has none."""
    parameter = next(module.parameters(), None)
    return torch.get_default_dtype() if parameter is None else parameter.dtype
