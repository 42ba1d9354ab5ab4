"""The UNet without cross-attention: unconditional, by class, or by concatenated channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError
from fastldm.models.unet_base import UNetBase, UNetOptions, check_choice
from fastldm.modules.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from fastldm.modules.unet_blocks import (
    AttentionOptions,
    PlainAttentionOptions,
    ResnetOptions,
    UNetMidBlock2D,
)
from fastldm.outputs import BaseOutput

_FOURIER_SCALE = 16


@dataclass
class UNet2DOutput(BaseOutput):
    """What the UNet predicts (noise, the clean sample or velocity): [B, out_channels, H, W]."""

    sample: Tensor


class UNet2DModel(UNetBase):
    """The UNet of DDPM and ADM (https://arxiv.org/abs/2006.11239, 2105.05233), as in LDM's
    unconditional models (https://arxiv.org/abs/2112.10752, Tables 12 and 14).

    Args:
        sample_size: side of the samples that it is meant for; any size is accepted.
        in_channels: channels of the input, those of a concatenated condition included.
        out_channels: channels of the output.
        center_input_sample: map the input from [0, 1] to [−1, 1].
        time_embedding_type: "positional", "fourier" (the output is then divided by the time), or
            "learned" for `num_train_timesteps` integers.
        time_embedding_dim: width of the time embedding; None: four times the first level's.
        freq_shift, flip_sin_to_cos: see `fastldm.modules.embeddings.get_timestep_embedding`.
        down_block_types: for each level "DownBlock2D", "AttnDownBlock2D" (attention after each
            residual block) or "ResnetDownsampleBlock2D" (a residual block downsamples).
        mid_block_type: "UNetMidBlock2D" or None.
        up_block_types: "UpBlock2D", "AttnUpBlock2D" or "ResnetUpsampleBlock2D", lowest resolution
            first.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks a level on the way down; one more on the way up.
        mid_block_scale_factor: the sums in the middle block are divided by it.
        downsample_padding: 1, or 0 to pad below and to the right only.
        downsample_type, upsample_type: "conv" or "resnet", in the blocks with attention.
        dropout: in the residual blocks.
        act_fn: "silu", "gelu", "mish" or "relu".
        attention_head_dim: channels a head; None: one head.
        norm_num_groups, norm_eps: of every GroupNorm.
        attn_norm_num_groups: groups of the middle attention's norm; None: `norm_num_groups`, and
            no norm with "scale_shift".
        resnet_time_scale_shift: "default" (the time embedding is added) or "scale_shift".
        add_attention: attention in the middle block.
        class_embed_type: "timestep", "identity" or None.
        num_class_embeds: number of classes with a learned embedding, where that type is None.
        num_train_timesteps: see `time_embedding_type`.
        num_attention_heads: number of heads in every attention, in place of
            `attention_head_dim`. diffusers has no such field, nor the following.
        resample_with_conv: a convolution where the resolution changes ("conv" above); else
            average pooling and repetition alone.

    Raises:
        ConfigError: a field has a value that is not listed, or two do not fit each other.
    """

    diffusers_class = "UNet2DModel"
    extension_fields = frozenset({"num_attention_heads", "resample_with_conv"})

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = (
            "DownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = (
            "AttnUpBlock2D",
            "AttnUpBlock2D",
            "AttnUpBlock2D",
            "UpBlock2D",
        ),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | None = None,
        resample_with_conv: bool = True,
    ) -> None:
        super().__init__()
        options = UNetOptions(
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=[layers_per_block] * len(block_out_channels),
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resample_with_conv=resample_with_conv,
        )
        check_choice("mid_block_type", mid_block_type, ("UNetMidBlock2D", None))
        check_choice("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift"))
        self.sample_size = sample_size
        self._center_input_sample = center_input_sample
        self._divide_by_time = time_embedding_type == "fourier"
        self._class_embed_type = class_embed_type
        time_embed_dim = time_embedding_dim or 4 * block_out_channels[0]

        self._add_embeddings(
            time_embedding_type,
            block_out_channels[0],
            time_embed_dim,
            flip_sin_to_cos,
            freq_shift,
            num_train_timesteps,
            class_embed_type,
            num_class_embeds,
        )
        resnet = ResnetOptions(
            temb_channels=time_embed_dim,
            groups=norm_num_groups,
            eps=norm_eps,
            non_linearity=act_fn,
            dropout=dropout,
            time_embedding_norm=resnet_time_scale_shift,
        )
        plain = PlainAttentionOptions(
            head_dim=attention_head_dim,
            num_heads=num_attention_heads,
            groups=norm_num_groups,
            eps=norm_eps,
        )

        def attention(kind: type[AttentionOptions], _: int) -> AttentionOptions:
            if kind is not PlainAttentionOptions:
                raise ConfigError(
                    "down_block_types, up_block_types: this model has no cross-attention; use "
                    "UNet2DConditionModel"
                )
            return plain

        mid_block: UNetMidBlock2D | None = None
        if mid_block_type is not None:
            if attn_norm_num_groups is None and resnet_time_scale_shift == "default":
                attn_norm_num_groups = norm_num_groups
            mid_block = UNetMidBlock2D(
                block_out_channels[-1],
                replace(resnet, output_scale_factor=mid_block_scale_factor),
                replace(
                    plain, groups=attn_norm_num_groups, output_scale_factor=mid_block_scale_factor
                )
                if add_attention
                else None,
            )
        self._add_levels(options, resnet, mid_block, attention, attention)
        self._add_ends(
            in_channels,
            out_channels,
            block_out_channels[0],
            norm_num_groups,
            norm_eps,
            nn.SiLU(),
        )

    def _add_embeddings(
        self,
        time_embedding_type: str,
        channels: int,
        time_embed_dim: int,
        flip_sin_to_cos: bool,
        freq_shift: int,
        num_train_timesteps: int | None,
        class_embed_type: str | None,
        num_class_embeds: int | None,
    ) -> None:
        """Set ``time_proj``, ``time_embedding`` and ``class_embedding``."""
        check_choice(
            "time_embedding_type", time_embedding_type, ("positional", "fourier", "learned")
        )
        check_choice("class_embed_type", class_embed_type, (None, "timestep", "identity"))
        input_dim = channels
        if time_embedding_type == "fourier":
            self.time_proj = GaussianFourierProjection(channels, scale=_FOURIER_SCALE)
            input_dim = 2 * channels
        elif time_embedding_type == "positional":
            self.time_proj = Timesteps(channels, flip_sin_to_cos, freq_shift)
        elif num_train_timesteps is None:
            raise ConfigError("num_train_timesteps: needed by time_embedding_type 'learned'")
        else:
            self.time_proj = nn.Embedding(num_train_timesteps, channels)
        self.time_embedding = TimestepEmbedding(input_dim, time_embed_dim)
        self.class_embedding = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(input_dim, time_embed_dim)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """
        Args:
            sample: [B, in_channels, H, W].
            timestep: a number, or [B].
            class_labels: [B] classes, or what `class_embed_type` takes.
            return_dict: return `UNet2DOutput`, not a tuple.

        Returns:
            [B, out_channels, H, W].

        Raises:
            DataError: an input has another shape than the model takes, or class labels are
                missing, or given to a model without them.
        """
        self._check_sample(sample)
        if self._center_input_sample:
            sample = 2 * sample - 1.0
        timesteps = self._timesteps(timestep, sample)
        emb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        class_emb = self._embed_classes(class_labels, emb)
        emb = emb if class_emb is None else emb + class_emb

        sample, states = self._down(self.conv_in(sample), emb)
        if self.mid_block is not None:
            sample = self.mid_block(sample, emb)
        sample = self._finish(self._up(sample, states, emb))
        if self._divide_by_time:
            sample = sample / timesteps.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample) if return_dict else (sample,)
