"""The vectors that condition every residual block of `UNet2DConditionModel`, and its context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError, DataError
from fastldm.models.unet_base import UNetBase, check_choice
from fastldm.modules.activations import get_activation
from fastldm.modules.embeddings import (
    GaussianFourierProjection,
    TextTimeEmbedding,
    TimestepEmbedding,
    Timesteps,
)
from fastldm.modules.unet_blocks import Context

_CLASS_EMBED_TYPES = (None, "timestep", "identity", "projection", "simple_projection")


@dataclass(frozen=True)
class EmbeddingOptions:
    """The fields of `UNet2DConditionModel`'s config that shape its embeddings."""

    channels: int
    act_fn: str
    flip_sin_to_cos: bool
    freq_shift: int
    time_embedding_type: str
    time_embedding_dim: int | None
    time_embedding_act_fn: str | None
    timestep_post_act: str | None
    time_cond_proj_dim: int | None
    class_embed_type: str | None
    num_class_embeds: int | None
    class_embeddings_concat: bool
    projection_class_embeddings_input_dim: int | None
    addition_embed_type: str | None
    addition_time_embed_dim: int | None
    addition_embed_type_num_heads: int
    encoder_hid_dim: int | None
    encoder_hid_dim_type: str | None
    cross_attention_dim: int | None
    """None where the levels have contexts of different widths."""

    def __post_init__(self) -> None:
        check_choice("time_embedding_type", self.time_embedding_type, ("positional", "fourier"))
        check_choice("class_embed_type", self.class_embed_type, _CLASS_EMBED_TYPES)
        check_choice("addition_embed_type", self.addition_embed_type, (None, "text", "text_time"))
        check_choice("encoder_hid_dim_type", self.encoder_hid_dim_type, (None, "text_proj"))
        if self.encoder_hid_dim_type is not None:
            self.required("encoder_hid_dim", f"encoder_hid_dim_type {self.encoder_hid_dim_type!r}")

    def required(self, field: str, user: str) -> int:
        """The value of `field`, which `user` needs.

        Raises:
            ConfigError: it is None.
        """
        value = getattr(self, field)
        if value is None:
            raise ConfigError(f"{field}: needed by {user}, got None")
        return value


class EmbeddingUNet(UNetBase):
    """The embeddings of `UNet2DConditionModel`."""

    def _add_embeddings(self, options: EmbeddingOptions) -> int:
        """Set the embedding modules; return the width of what residual blocks receive."""
        self._class_embed_type = options.class_embed_type
        self._class_embeddings_concat = options.class_embeddings_concat
        self._addition_embed_type = options.addition_embed_type
        time_embed_dim, input_dim = self._add_time_embedding(options)
        self._add_class_embedding(options, input_dim, time_embed_dim)
        self._add_addition_embedding(options, time_embed_dim)
        self.encoder_hid_proj: nn.Module | None = None
        if options.encoder_hid_dim is not None:
            width = options.required("cross_attention_dim", "encoder_hid_dim (one for all levels)")
            self.encoder_hid_proj = nn.Linear(options.encoder_hid_dim, width)
        if options.class_embeddings_concat and self.class_embedding is not None:
            return 2 * time_embed_dim
        return time_embed_dim

    def _add_time_embedding(self, options: EmbeddingOptions) -> tuple[int, int]:
        """Set ``time_proj`` and ``time_embedding``; return the widths behind and before it."""
        if options.time_embedding_type == "fourier":
            time_embed_dim = options.time_embedding_dim or 2 * options.channels
            if time_embed_dim % 2:
                raise ConfigError(
                    f"time_embedding_dim: 'fourier' needs an even width, got {time_embed_dim}"
                )
            input_dim = time_embed_dim
            self.time_proj = GaussianFourierProjection(
                time_embed_dim // 2, log=False, flip_sin_to_cos=options.flip_sin_to_cos
            )
        else:
            time_embed_dim = options.time_embedding_dim or 4 * options.channels
            input_dim = options.channels
            self.time_proj = Timesteps(input_dim, options.flip_sin_to_cos, options.freq_shift)
        self.time_embedding = TimestepEmbedding(
            input_dim,
            time_embed_dim,
            act_fn=options.act_fn,
            post_act_fn=options.timestep_post_act,
            cond_proj_dim=options.time_cond_proj_dim,
        )
        self.time_embed_act = (
            None
            if options.time_embedding_act_fn is None
            else get_activation(options.time_embedding_act_fn)
        )
        return time_embed_dim, input_dim

    def _add_class_embedding(
        self, options: EmbeddingOptions, input_dim: int, time_embed_dim: int
    ) -> None:
        kind = options.class_embed_type
        self.class_embedding = None
        if kind == "timestep":
            self.class_embedding = TimestepEmbedding(
                input_dim, time_embed_dim, act_fn=options.act_fn
            )
        elif kind == "identity":
            self.class_embedding = nn.Identity()
        elif kind is not None:
            width = options.required(
                "projection_class_embeddings_input_dim", f"class_embed_type {kind!r}"
            )
            projection = TimestepEmbedding if kind == "projection" else nn.Linear
            self.class_embedding = projection(width, time_embed_dim)
        elif options.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(options.num_class_embeds, time_embed_dim)

    def _add_addition_embedding(self, options: EmbeddingOptions, time_embed_dim: int) -> None:
        self.add_embedding: nn.Module | None = None
        if options.addition_embed_type == "text":
            user = "addition_embed_type 'text'"
            width = options.encoder_hid_dim or options.required("cross_attention_dim", user)
            self.add_embedding = TextTimeEmbedding(
                width, time_embed_dim, num_heads=options.addition_embed_type_num_heads
            )
        elif options.addition_embed_type == "text_time":
            user = "addition_embed_type 'text_time'"
            self.add_time_proj = Timesteps(
                options.required("addition_time_embed_dim", user),
                options.flip_sin_to_cos,
                options.freq_shift,
            )
            self._addition_width = options.required("projection_class_embeddings_input_dim", user)
            self.add_embedding = TimestepEmbedding(self._addition_width, time_embed_dim)

    def _embed(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        timestep_cond: Tensor | None,
        class_labels: Tensor | None,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Any] | None,
    ) -> Tensor:
        """What every residual block receives, [B, width]."""
        timesteps = self._timesteps(timestep, sample)
        emb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype), timestep_cond)
        class_emb = self._embed_classes(class_labels, emb)
        if class_emb is not None and self._class_embeddings_concat:
            emb = torch.cat([emb, class_emb], dim=-1)
        elif class_emb is not None:
            emb = emb + class_emb
        if self.add_embedding is not None:
            if self._addition_embed_type == "text":
                emb = emb + self.add_embedding(encoder_hidden_states)
            else:
                emb = emb + self.add_embedding(self._text_and_time(added_cond_kwargs, emb))
        return emb if self.time_embed_act is None else self.time_embed_act(emb)

    def _text_and_time(self, added: Mapping[str, Any] | None, emb: Tensor) -> Tensor:
        """SDXL's pooled text and embedded sizes, [B, projection_class_embeddings_input_dim]."""
        missing = {"text_embeds", "time_ids"} - set(added or {})
        if added is None or missing:
            raise DataError(
                f"added_cond_kwargs: addition_embed_type 'text_time' needs {sorted(missing)}"
            )
        text, times = added["text_embeds"], added["time_ids"]
        times = self.add_time_proj(times.flatten()).unflatten(0, (text.shape[0], -1)).flatten(1)
        both = torch.cat([text, times.to(text.dtype)], dim=-1).to(emb.dtype)
        if both.shape[-1] != self._addition_width:
            raise DataError(
                f"added_cond_kwargs: text_embeds {list(text.shape)} and time_ids "
                f"{list(added['time_ids'].shape)} give {both.shape[-1]} features, "
                f"expected {self._addition_width}"
            )
        return both

    def _context(
        self,
        sample: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        attention_mask: Tensor | None,
        widths: frozenset[int],
        added_cond_kwargs: Mapping[str, Any] | None,
        keywords: Mapping[str, Any],
    ) -> Context:
        """What the transformers attend to; `widths` is what they accept."""
        projection = self._text_projection()
        if projection is not None:
            widths = frozenset({projection.in_features})
        shape = list(encoder_hidden_states.shape)
        if len(shape) != 3 or shape[0] != sample.shape[0] or {shape[2]} != (widths or {shape[2]}):
            expected = " or ".join(str(width) for width in sorted(widths)) or "any"
            raise DataError(
                f"encoder_hidden_states: expected [{sample.shape[0]}, length, {expected}], "
                f"got {shape}"
            )
        if encoder_attention_mask is not None:
            if list(encoder_attention_mask.shape) != shape[:2]:
                raise DataError(
                    f"encoder_attention_mask: expected {shape[:2]}, "
                    f"got {list(encoder_attention_mask.shape)}"
                )
            encoder_attention_mask = encoder_attention_mask.bool()
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        hidden_states: Any = encoder_hidden_states
        if projection is not None:
            hidden_states = projection(hidden_states)
        image_projection = self._image_projection()
        if image_projection is not None:
            if added_cond_kwargs is None or "image_embeds" not in added_cond_kwargs:
                raise DataError("added_cond_kwargs: the loaded IP-Adapter needs 'image_embeds'")
            hidden_states = (hidden_states, image_projection(added_cond_kwargs["image_embeds"]))
        return Context(hidden_states, encoder_attention_mask, attention_mask, keywords)

    def _image_projection(self) -> Any:
        """The projection that diffusers' IP-Adapter loader puts in place of the text's, or None."""
        return None if hasattr(self.encoder_hid_proj, "in_features") else self.encoder_hid_proj

    def _text_projection(self) -> Any:
        """The layer that projects the text's features, or None."""
        if self._image_projection() is not None:
            return getattr(self, "text_encoder_hid_proj", None)
        return self.encoder_hid_proj
