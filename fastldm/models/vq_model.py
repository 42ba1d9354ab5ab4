"""The first stage with a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.models.first_stage import DecoderOutput, FirstStageModel, runs_forward_hook
from fastldm.modules.autoencoder_blocks import Decoder, Encoder
from fastldm.modules.quantize import VectorQuantizer
from fastldm.outputs import BaseOutput

_CODEBOOK_BETA = 0.25


@dataclass
class VQEncoderOutput(BaseOutput):
    """What the encoder gives: latents before quantisation, [B, vq_embed_dim, h, w]."""

    latents: Tensor


class VQModel(FirstStageModel):
    """A convolutional autoencoder whose decoder begins with a lookup in a codebook.

    The diffusion model works on the continuous latents before the lookup; the quantiser is part
    of the decoder (Rombach et al., section 3.1).

    Args:
        in_channels … norm_num_groups: as in `AutoencoderKL`.
        num_vq_embeddings: K, number of codes.
        vq_embed_dim: channels of a code, `latent_channels` if None.
        scaling_factor: the diffusion model sees z · scaling_factor.
        norm_type: "group", or "spatial": MoVQ's decoder, whose norms the codes modulate.
        mid_block_add_attention: attention in the middle blocks.
        lookup_from_codebook: ``decode(…, force_not_quantize=True)`` takes indices.
        force_upcast: pipelines run this model in float32 where the rest is in half precision.
        codebook_ema_decay: decay of the codebook's moving averages; None: it learns by gradient.
        dead_code_threshold: a code with fewer uses a batch than this (a moving average) is
            replaced by a random latent of the batch; None: never.
        codebook_initialization: "uniform" in ±1/K, or "data": k-means of the first batch.
        output_activation: None, or "tanh" on the decoded image.
        dropout, attention_type, resample_with_conv: as in `AutoencoderKL`.
        num_used_embeddings: n; the quantiser's indices are then positions in the n codes of the
            buffer ``quantize.used``, taming's ``remap``. A new model lists the first n.
        unknown_index: index of the other codes: "random", "extra" (n) or a number.

    Raises:
        ConfigError: an argument has a value that is not listed, or two do not fit each other.
    """

    diffusers_class = "VQModel"
    extension_fields = frozenset(
        {
            "attention_type",
            "codebook_ema_decay",
            "codebook_initialization",
            "dead_code_threshold",
            "dropout",
            "num_used_embeddings",
            "output_activation",
            "resample_with_conv",
            "unknown_index",
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
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        codebook_ema_decay: float | None = None,
        dead_code_threshold: float | None = None,
        codebook_initialization: str = "uniform",
        output_activation: str | None = None,
        dropout: float = 0.0,
        attention_type: str = "default",
        resample_with_conv: bool = True,
        num_used_embeddings: int | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__()
        if norm_type not in ("group", "spatial"):
            raise ConfigError(f"norm_type: expected 'group' or 'spatial', got {norm_type!r}")
        code_channels = latent_channels if vq_embed_dim is None else vq_embed_dim
        if norm_type == "spatial" and code_channels != latent_channels:
            raise ConfigError(
                f"vq_embed_dim: the spatial norm wants latent_channels = {latent_channels}, "
                f"got {code_channels}"
            )
        self._set_up(block_out_channels, sample_size, in_channels, code_channels, output_activation)
        self.lookup_from_codebook = lookup_from_codebook
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types,
            block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
            dropout=dropout,
            attention_type=attention_type,
            resample_with_conv=resample_with_conv,
        )
        self.quant_conv = nn.Conv2d(latent_channels, code_channels, 1)
        self.quantize = VectorQuantizer(
            num_vq_embeddings,
            code_channels,
            ema_decay=codebook_ema_decay,
            dead_code_threshold=dead_code_threshold,
            initialization=codebook_initialization,
            used=_first_codes(num_used_embeddings, num_vq_embeddings),
            unknown_index=unknown_index,
        )
        self.post_quant_conv = nn.Conv2d(code_channels, latent_channels, 1)
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            up_block_types,
            block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
            spatial_norm=norm_type == "spatial",
            dropout=dropout,
            attention_type=attention_type,
            resample_with_conv=resample_with_conv,
        )
        self._codes_reach_norms = norm_type == "spatial"

    @runs_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Latents of images, before quantisation.

        Args:
            x: [B, in_channels, H, W], usually in [−1, 1]; H and W multiples of f.

        Returns:
            ``.latents``, [B, vq_embed_dim, H/f, W/f].

        Raises:
            DataError: the shape does not fit the model.
        """
        latents = self._encode(x)
        return VQEncoderOutput(latents) if return_dict else (latents,)

    @runs_forward_hook
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Images of latents that are not scaled.

        Args:
            h: [B, vq_embed_dim, h, w]; or, with `force_not_quantize` in a model configured with
                ``lookup_from_codebook``, int64 code indices of B·h·w elements.
            force_not_quantize: `h` is already quantised (or indices, see above).
            shape: of the codes of such indices, (B, h, w, vq_embed_dim).

        Returns:
            ``.sample``, [B, out_channels, f·h, f·w], and ``.commit_loss``: the sum of the
            commitment loss and 0.25 · the codebook loss, diffusers' (and taming-transformers'
            legacy) weights; zeros [B] where nothing was quantised.

        Raises:
            DataError: the shape does not fit the model.
        """
        if force_not_quantize:
            from_codebook = self.lookup_from_codebook
            quantized = self.quantize.get_codebook_entry(h, shape) if from_codebook else h
            commit_loss = torch.zeros(quantized.shape[0], dtype=quantized.dtype, device=h.device)
        else:
            self._check_latents(h)
            found = self.quantize(h)
            quantized = found.z_q
            commit_loss = found.commitment_loss + _CODEBOOK_BETA * found.codebook_loss
        sample = self._decode(quantized)
        return DecoderOutput(sample, commit_loss) if return_dict else (sample, commit_loss)

    def forward(
        self, sample: Tensor, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Reconstruct images, [B, in_channels, H, W]; the output is that of `decode`."""
        latents = self.encode(sample, return_dict=False)[0]
        return self.decode(latents, return_dict=return_dict)


def _first_codes(count: int | None, num_embeddings: int) -> Tensor | None:
    if count is None:
        return None
    whole = isinstance(count, int) and not isinstance(count, bool)
    if not whole or not 1 <= count <= num_embeddings:
        raise ConfigError(
            f"num_used_embeddings: expected None or a number from 1 to {num_embeddings}, "
            f"got {count!r}"
        )
    return torch.arange(count)
