"""The continuous first stage: KL-regularised, Kingma's VAE, or a plain autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.models.first_stage import DecoderOutput, FirstStageModel, runs_forward_hook
from fastldm.modules.autoencoder_blocks import Decoder, Encoder
from fastldm.modules.distributions import DiagonalGaussianDistribution, PointDistribution
from fastldm.outputs import BaseOutput


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """What the encoder gives: the distribution of the latents."""

    latent_dist: DiagonalGaussianDistribution | PointDistribution


class AutoencoderKL(FirstStageModel):
    """A convolutional autoencoder whose latents have a diagonal Gaussian posterior.

    Kingma's VAE (https://arxiv.org/abs/1312.6114) is the same model trained with another weight
    on its KL term; with ``latent_regularization="none"`` it is a plain autoencoder.

    Args:
        in_channels, out_channels: channels of the images.
        down_block_types: "DownEncoderBlock2D" or, with attention after each residual block,
            "AttnDownEncoderBlock2D", for each level.
        up_block_types: "UpDecoderBlock2D" or "AttnUpDecoderBlock2D", lowest resolution first.
        block_out_channels: channels of each level; f = 2^(levels − 1).
        layers_per_block: residual blocks a level in the encoder; the decoder has one more.
        act_fn: activation of the residual blocks.
        latent_channels: channels of the latents.
        norm_num_groups: groups of every GroupNorm.
        sample_size: side of a tile when tiling is enabled.
        scaling_factor: the diffusion model sees (z − shift_factor) · scaling_factor.
        shift_factor: see above; None is 0.
        latents_mean, latents_std: the same for each channel, stored for the diffusion model.
        force_upcast: pipelines run this model in float32 where the rest is in half precision.
        use_quant_conv, use_post_quant_conv: a 1×1 convolution after the encoder and before the
            decoder.
        mid_block_add_attention: attention in the middle blocks.
        latent_regularization: "kl", or "none" for deterministic latents without a posterior.
        output_activation: None, or "tanh" on the decoded image.
        embed_dim: channels of the latents where the 1×1 convolutions change their number;
            None: `latent_channels`. diffusers has no such field, nor the following.
        dropout: in the residual blocks.
        attention_type: "default", or "linear": `fastldm.modules.linear_attention`.
        resample_with_conv: a convolution where the resolution changes; else average pooling and
            repetition alone.

    Raises:
        ConfigError: an argument has a value that is not listed, or two do not fit each other.
    """

    diffusers_class = "AutoencoderKL"
    extension_fields = frozenset(
        {
            "attention_type",
            "dropout",
            "embed_dim",
            "latent_regularization",
            "output_activation",
            "resample_with_conv",
        }
    )

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        latent_regularization: str = "kl",
        output_activation: str | None = None,
        embed_dim: int | None = None,
        dropout: float = 0.0,
        attention_type: str = "default",
        resample_with_conv: bool = True,
    ) -> None:
        super().__init__()
        if latent_regularization not in ("kl", "none"):
            raise ConfigError(
                f"latent_regularization: expected 'kl' or 'none', got {latent_regularization!r}"
            )
        channels = latent_channels if embed_dim is None else embed_dim
        if channels != latent_channels and not (use_quant_conv and use_post_quant_conv):
            raise ConfigError(
                f"embed_dim: {channels} where latent_channels is {latent_channels} needs "
                "use_quant_conv and use_post_quant_conv"
            )
        self._set_up(block_out_channels, sample_size, in_channels, channels, output_activation)
        self.has_posterior = latent_regularization == "kl"
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types,
            block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            double_z=self.has_posterior,
            mid_block_add_attention=mid_block_add_attention,
            dropout=dropout,
            attention_type=attention_type,
            resample_with_conv=resample_with_conv,
        )
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            up_block_types,
            block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
            dropout=dropout,
            attention_type=attention_type,
            resample_with_conv=resample_with_conv,
        )
        both = 2 if self.has_posterior else 1
        self.quant_conv = (
            nn.Conv2d(both * latent_channels, both * channels, 1) if use_quant_conv else None
        )
        self.post_quant_conv = (
            nn.Conv2d(channels, latent_channels, 1) if use_post_quant_conv else None
        )

    @runs_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution | PointDistribution]:
        """The posterior of the latents of images.

        Args:
            x: [B, in_channels, H, W], usually in [−1, 1]; H and W multiples of f.

        Returns:
            ``.latent_dist`` with ``sample(generator)``, ``mode()``, ``kl()``, ``mean``, ``std``.

        Raises:
            DataError: the shape does not fit the model.
        """
        encoded = self._encode(x)
        posterior = (
            DiagonalGaussianDistribution(encoded)
            if self.has_posterior
            else PointDistribution(encoded)
        )
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @runs_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images of latents that are not scaled.

        Args:
            z: [B, latent_channels (or embed_dim), h, w].
            generator: not used; diffusers' pipelines pass one.

        Returns:
            ``.sample``, [B, out_channels, f·h, f·w].

        Raises:
            DataError: the shape does not fit the model.
        """
        sample = self._decode(z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct images.

        Args:
            sample: [B, in_channels, H, W].
            sample_posterior: decode a sample of the posterior; else its mode.
            generator: for that sample.
        """
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)
