"""The UNet with cross-attention: text, classes, layouts and added embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastldm.configuration import register_to_config
from fastldm.errors import DataError
from fastldm.models.lora_scale import LoraScale
from fastldm.models.unet_attention import AttentionFields
from fastldm.models.unet_base import UNetOptions, check_choice, per_level
from fastldm.models.unet_embeddings import EmbeddingOptions, EmbeddingUNet
from fastldm.modules.activations import get_activation
from fastldm.modules.unet_blocks import ResnetOptions, UNetMidBlock2D
from fastldm.outputs import BaseOutput

_MID_BLOCK_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """What the UNet predicts (noise, the clean sample or velocity): [B, out_channels, H, W]."""

    sample: Tensor


class UNet2DConditionModel(EmbeddingUNet):
    """The UNet of latent diffusion with cross-attention (https://arxiv.org/abs/2112.10752, 3.3),
    of Stable Diffusion 1 and 2, and of SDXL (https://arxiv.org/abs/2307.01952).

    Fields "of each level" take one value, or a sequence with one entry a level.

    Args:
        sample_size: side of the samples that it is meant for; any size is accepted.
        in_channels: channels of the input, those of a concatenated condition included.
        out_channels: channels of the output.
        center_input_sample: map the input from [0, 1] to [−1, 1].
        flip_sin_to_cos, freq_shift: see `fastldm.modules.embeddings.get_timestep_embedding`.
        down_block_types: for each level "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"
            or "ResnetDownsampleBlock2D".
        mid_block_type: "UNetMidBlock2DCrossAttn", "UNetMidBlock2D" (one residual block) or None.
        up_block_types: "CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D" or
            "ResnetUpsampleBlock2D", lowest resolution first.
        only_cross_attention: of each level: the transformers have no self-attention.
        block_out_channels: channels of each level.
        layers_per_block: of each level: residual blocks on the way down; one more on the way up.
        downsample_padding: 1, or 0 to pad below and to the right only.
        mid_block_scale_factor: the sums in the middle block are divided by it.
        dropout: in the residual blocks.
        act_fn: "silu", "gelu", "mish" or "relu".
        norm_num_groups, norm_eps: of every GroupNorm (the transformers' eps is 1e-6).
        cross_attention_dim: of each level: width of the context.
        transformer_layers_per_block: of each level: transformer blocks after a residual block, or
            a sequence with one entry a residual block.
        reverse_transformer_layers_per_block: the same for the way up, lowest resolution first;
            None: the reverse of the way down.
        encoder_hid_dim: the context has this width and is projected to `cross_attention_dim`.
        encoder_hid_dim_type: None or "text_proj".
        attention_head_dim: of each level: **number** of heads of the transformers, and channels a
            head of plain attention; the name is diffusers'.
        num_attention_heads: of each level: number of heads of every attention, in place of the
            former.
        use_linear_projection: linear layers, not 1×1 convolutions, around the transformers.
        class_embed_type: None, "timestep", "identity", "projection" or "simple_projection".
        addition_embed_type: None, "text" (the context, pooled) or "text_time" (SDXL).
        addition_time_embed_dim: width of each embedded number of "text_time".
        num_class_embeds: number of classes with a learned embedding.
        upcast_attention: compute attention in float32.
        resnet_time_scale_shift: "default" (the time embedding is added) or "scale_shift".
        time_embedding_type: "positional" or "fourier".
        time_embedding_dim: width of the time embedding; None: four times the first level's.
        time_embedding_act_fn: activation of the finished embedding, or None.
        timestep_post_act: activation after the time embedding's second layer, or None.
        time_cond_proj_dim: width of `timestep_cond`.
        conv_in_kernel, conv_out_kernel: kernel sizes of the first and last convolution.
        projection_class_embeddings_input_dim: width of what the class projections or "text_time"
            take.
        class_embeddings_concat: append the class embedding, rather than add it.
        addition_embed_type_num_heads: heads that pool the context for "text".
        dual_cross_attention, resnet_skip_time_act, resnet_out_scale_factor, attention_type,
            mid_block_only_cross_attention, cross_attention_norm: fields of diffusers' configs for
            other families of models; only the values that leave them off are accepted.
        num_head_channels: channels a head of every attention, as the paper's models fix it. It
            is recorded as the numbers of heads that it gives, which diffusers understands,
            where the model has no plain attention. diffusers has no such field.
        downsample_type, upsample_type: "conv" or "resnet" (a residual block), in the blocks with
            attention. diffusers has no such fields in this model, nor the following.
        resample_with_conv: a convolution where the resolution changes ("conv" above); else
            average pooling and repetition alone.

    Raises:
        ConfigError: a field has a value that is not listed, or two do not fit each other.
    """

    diffusers_class = "UNet2DConditionModel"
    extension_fields = frozenset(
        {"downsample_type", "num_head_channels", "resample_with_conv", "upsample_type"}
    )

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | Sequence[int] = 1280,
        transformer_layers_per_block: int | Sequence[int | Sequence[int]] = 1,
        reverse_transformer_layers_per_block: Sequence[int | Sequence[int]] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | Sequence[int] = 8,
        num_attention_heads: int | Sequence[int] | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
        num_head_channels: int | None = None,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        resample_with_conv: bool = True,
    ) -> None:
        super().__init__()
        for name, value, accepted in (
            ("dual_cross_attention", dual_cross_attention, (False,)),
            ("resnet_skip_time_act", resnet_skip_time_act, (False,)),
            ("resnet_out_scale_factor", resnet_out_scale_factor, (1.0,)),
            ("attention_type", attention_type, ("default",)),
            ("mid_block_only_cross_attention", mid_block_only_cross_attention, (None, False)),
            ("cross_attention_norm", cross_attention_norm, (None,)),
            ("mid_block_type", mid_block_type, _MID_BLOCK_TYPES),
            ("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift")),
        ):
            check_choice(name, value, accepted)
        levels = len(block_out_channels)
        layers = per_level("layers_per_block", layers_per_block, levels)
        options = UNetOptions(
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resample_with_conv=resample_with_conv,
        )
        context_dims = per_level("cross_attention_dim", cross_attention_dim, levels)
        self.sample_size = sample_size
        self._center_input_sample = center_input_sample
        temb_channels = self._add_embeddings(
            EmbeddingOptions(
                channels=block_out_channels[0],
                act_fn=act_fn,
                flip_sin_to_cos=flip_sin_to_cos,
                freq_shift=freq_shift,
                time_embedding_type=time_embedding_type,
                time_embedding_dim=time_embedding_dim,
                time_embedding_act_fn=time_embedding_act_fn,
                timestep_post_act=timestep_post_act,
                time_cond_proj_dim=time_cond_proj_dim,
                class_embed_type=class_embed_type,
                num_class_embeds=num_class_embeds,
                class_embeddings_concat=class_embeddings_concat,
                projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
                addition_embed_type=addition_embed_type,
                addition_time_embed_dim=addition_time_embed_dim,
                addition_embed_type_num_heads=addition_embed_type_num_heads,
                encoder_hid_dim=encoder_hid_dim,
                encoder_hid_dim_type=encoder_hid_dim_type,
                cross_attention_dim=context_dims[0] if len(set(context_dims)) == 1 else None,
            )
        )
        attention = AttentionFields(
            channels=block_out_channels,
            layers=layers,
            context_dims=context_dims,
            head_dims=per_level("attention_head_dim", attention_head_dim, levels),
            num_heads=per_level("num_attention_heads", num_attention_heads, levels),
            head_channels=num_head_channels,
            only_cross=per_level("only_cross_attention", only_cross_attention, levels),
            transformer_layers=per_level(
                "transformer_layers_per_block", transformer_layers_per_block, levels
            ),
            reverse_transformer_layers=reverse_transformer_layers_per_block,
            groups=norm_num_groups,
            eps=norm_eps,
            use_linear_projection=use_linear_projection,
            upcast_attention=upcast_attention,
        )
        resnet = ResnetOptions(
            temb_channels=temb_channels,
            groups=norm_num_groups,
            eps=norm_eps,
            non_linearity=act_fn,
            dropout=dropout,
            time_embedding_norm=resnet_time_scale_shift,
        )
        mid_block: UNetMidBlock2D | None = None
        if mid_block_type is not None:
            crossing = mid_block_type == "UNetMidBlock2DCrossAttn"
            mid_block = UNetMidBlock2D(
                block_out_channels[-1],
                replace(resnet, output_scale_factor=mid_block_scale_factor),
                attention.mid() if crossing else None,
                num_layers=1 if crossing else 0,
            )
        self._add_levels(options, resnet, mid_block, attention.down, attention.up)
        self._add_ends(
            in_channels,
            out_channels,
            block_out_channels[0],
            norm_num_groups,
            norm_eps,
            get_activation(act_fn),
            kernels=(conv_in_kernel, conv_out_kernel),
        )
        self._context_widths = self._widths_of_contexts(context_dims)
        if encoder_hid_dim is not None:
            self.register_config(encoder_hid_dim_type="text_proj")
        blocks = [*self.down_blocks, *self.up_blocks]
        if num_head_channels is not None and not any(
            block.attentions is not None and not block.has_cross_attention for block in blocks
        ):
            heads = [attention.heads(level) for level in range(levels)]
            self.register_config(attention_head_dim=heads, num_head_channels=None)

    def _widths_of_contexts(self, context_dims: Sequence[int]) -> frozenset[int]:
        """The widths of context that some level takes; empty without cross-attention."""
        widths = {
            width
            for width, down, up in zip(
                context_dims, self.down_blocks, reversed(self.up_blocks), strict=True
            )
            if down.has_cross_attention or up.has_cross_attention
        }
        if self.mid_block is not None and self.mid_block.has_cross_attention:
            widths.add(context_dims[-1])
        return frozenset(widths)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """
        Args:
            sample: [B, in_channels, H, W].
            timestep: a number, or [B].
            encoder_hidden_states: the context, [B, Lk, cross_attention_dim].
            class_labels: [B] classes or noise levels, or what `class_embed_type` takes.
            timestep_cond: [B, time_cond_proj_dim].
            attention_mask: [B, keys], 1 or True = attend, for the self-attention of the
                transformers; it must fit every level that has one.
            cross_attention_kwargs: ``scale``: the strength of LoRA layers that PEFT has loaded;
                others go to the attention processors that take them.
            added_cond_kwargs: with "text_time", ``text_embeds`` [B, width] and ``time_ids``
                [B, numbers]; with an IP-Adapter, ``image_embeds``, one entry an adapter.
            down_block_additional_residuals: of a ControlNet: one for each feature map that the
                way up takes.
            mid_block_additional_residual: of a ControlNet, together with the former.
            down_intrablock_additional_residuals: of a T2I-Adapter: one a level, and with one more
                also after the middle block.
            encoder_attention_mask: [B, Lk], 1 or True = attend.
            return_dict: return `UNet2DConditionOutput`, not a tuple.

        Returns:
            [B, out_channels, H, W].

        Raises:
            DataError: an input has another shape than the model takes, one that the config asks
                for is missing, or one that it does not know is given.
        """
        self._check_sample(sample)
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise DataError(
                "down_block_additional_residuals, mid_block_additional_residual: a ControlNet "
                "gives both; T2I-Adapter features go to down_intrablock_additional_residuals"
            )
        keywords = dict(cross_attention_kwargs or {})
        adapter = tuple(down_intrablock_additional_residuals or ())
        with LoraScale(self, keywords.pop("scale", 1.0)):
            if self._center_input_sample:
                sample = 2 * sample - 1.0
            context = self._context(
                sample,
                encoder_hidden_states,
                encoder_attention_mask,
                attention_mask,
                self._context_widths,
                added_cond_kwargs,
                self._checked_keywords(keywords),
            )
            emb = self._embed(
                sample,
                timestep,
                timestep_cond,
                class_labels,
                encoder_hidden_states,
                added_cond_kwargs,
            )
            sample, states = self._down(self.conv_in(sample), emb, context, adapter)
            if down_block_additional_residuals is not None:
                if len(down_block_additional_residuals) != len(states):
                    raise DataError(
                        f"down_block_additional_residuals: expected {len(states)}, "
                        f"got {len(down_block_additional_residuals)}"
                    )
                states = [
                    state + residual
                    for state, residual in zip(states, down_block_additional_residuals, strict=True)
                ]
            if self.mid_block is not None:
                sample = self.mid_block(sample, emb, context)
                last = adapter[len(self.down_blocks) :]
                if last and last[0].shape == sample.shape:
                    sample = sample + last[0]
            if mid_block_additional_residual is not None:
                sample = sample + mid_block_additional_residual
            sample = self._finish(self._up(sample, states, emb, context))
        return UNet2DConditionOutput(sample) if return_dict else (sample,)

    def _checked_keywords(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """`keywords`, each of which some attention processor takes."""
        accepted: set[str] = set()
        if keywords:
            for _, attention in self._attentions():
                accepted |= attention.processor_arguments
        if not accepted.issuperset(keywords):
            raise DataError(
                f"cross_attention_kwargs: no attention processor takes "
                f"{', '.join(map(repr, sorted(set(keywords) - accepted)))}"
            )
        return keywords
