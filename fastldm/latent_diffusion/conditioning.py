"""From captions, classes, embeddings and images to what the UNet is given beside z_t and t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError, DataError
from fastldm.models.class_embedder import ClassEmbedder

CONDITIONING_KINDS = ("none", "crossattn", "concat", "hybrid", "class")
_DEFAULT_CAPTION_LENGTH = 77


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the UNet beside z_t and t; those that a model does not use are None.

    Attributes:
        hidden_states: [B, L, D], the context of cross-attention.
        attention_mask: bool [B, L], True where the context is attended to.
        concat: [B, Cc, h, w], appended to the channels of z_t.
        class_labels: int64 [B], for the UNet's own class embedding.
    """

    hidden_states: Tensor | None = None
    attention_mask: Tensor | None = None
    concat: Tensor | None = None
    class_labels: Tensor | None = None

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Both batches one after the other.

        Raises:
            DataError: the contexts have different lengths or widths.
        """
        first, second = self.hidden_states, other.hidden_states
        if first is not None and second is not None and first.shape[1:] != second.shape[1:]:
            raise DataError(
                f"conditioning: the context is {list(first.shape[1:])} with and "
                f"{list(second.shape[1:])} without the condition; guidance needs one shape"
            )
        return Conditioning(
            _cat(first, second),
            _cat(self.attention_mask, other.attention_mask),
            _cat(self.concat, other.concat),
            _cat(self.class_labels, other.class_labels),
        )


@dataclass(frozen=True)
class ConditionEncoder:
    """Encodes conditions of one kind, and drops them where guidance asks for "no condition".

    Without a condition a caption is empty, a class is the unconditional one (the last row of the
    embedding) and a concatenated condition is zero. With ``"hybrid"`` only the context is dropped
    and the concatenated condition stays, as in Stable Diffusion's inpainting.

    Attributes:
        kind: one of `CONDITIONING_KINDS`.
        model: text encoder or `ClassEmbedder`; for ``"concat"`` a module that makes the appended
            channels; None where conditions come encoded.
        tokenizer: for captions: a `CaptionTokenizer`, or one of transformers.
        max_caption_length: L of captions.
        use_attention_mask: whether padding tokens are hidden from the encoder and the UNet.
        concat_channels: Cc.
        num_class_embeds: rows of the UNet's own class embedding.
    """

    kind: str
    model: nn.Module | None
    tokenizer: Any | None
    max_caption_length: int
    use_attention_mask: bool
    concat_channels: int
    num_class_embeds: int | None

    def __call__(
        self, cond: Any, batch_size: int, device: torch.device, drop: Tensor | None = None
    ) -> Conditioning:
        """Encode a batch of conditions.

        Args:
            cond: None for ``"none"``; for cross-attention captions (B strings), token ids (int64
                [B, L]), classes (int64 [B]) or a context (floating [B, L, D]); for ``"class"``
                int64 [B]; for ``"concat"`` floating [B, Cc, h, w]; for ``"hybrid"`` a dict with
                ``crossattn`` and ``concat``.
            batch_size: B.
            device: of the result.
            drop: bool [B], the samples to be left without condition.

        Raises:
            DataError: the condition is missing, of another type, shape or batch size.
            ConfigError: captions without a tokenizer, or nothing stands for "no condition".
        """
        if self.kind == "none":
            if cond is not None:
                raise DataError("cond: this model is unconditional (conditioning='none')")
            return Conditioning()
        if cond is None:
            raise DataError(f"cond: missing; the model's conditioning is {self.kind!r}")
        if self.kind == "hybrid":
            if not isinstance(cond, Mapping) or set(cond) != {"crossattn", "concat"}:
                raise DataError(
                    "cond: expected a dict with 'crossattn' and 'concat' for conditioning "
                    f"'hybrid', got {_describe(cond)}"
                )
            hidden, mask = self._context(cond["crossattn"], batch_size, device, drop)
            return Conditioning(hidden, mask, self._concat(cond["concat"], batch_size, device))
        if self.kind == "concat":
            return Conditioning(concat=self._concat(cond, batch_size, device, drop))
        if self.kind == "class" and self.model is None:
            return Conditioning(class_labels=self._classes(cond, batch_size, device, drop))
        return Conditioning(*self._context(cond, batch_size, device, drop))

    def _context(
        self, cond: Any, batch_size: int, device: torch.device, drop: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.model, ClassEmbedder):
            return self.model(self._classes(cond, batch_size, device, drop)), None
        if isinstance(cond, Tensor) and cond.is_floating_point():
            return self._embedded(cond, batch_size, device, drop)
        if self.model is None:
            raise DataError(
                "cond: the model has no conditioner, so it takes a floating context [B, L, D], "
                f"got {_describe(cond)}"
            )
        ids, mask = self._token_ids(cond, batch_size, drop)
        return self._encode_text(ids, mask, device)

    def _token_ids(
        self, cond: Any, batch_size: int, drop: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(cond, Tensor):
            if cond.ndim != 2 or cond.dtype == torch.bool:
                raise DataError(f"cond: expected token ids [B, L], got {_describe(cond)}")
            _check_batch(len(cond), batch_size)
            return self._drop_token_ids(cond, drop)
        if isinstance(cond, str) or not isinstance(cond, Sequence):
            raise DataError(f"cond: expected a sequence of captions, got {_describe(cond)}")
        _check_batch(len(cond), batch_size)
        captions = list(cond)
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise DataError(f"cond[{index}]: expected a caption, got {caption!r}")
        if drop is not None:
            captions = [
                "" if dropped else caption
                for caption, dropped in zip(captions, drop.tolist(), strict=True)
            ]
        return self._tokenize(captions)

    def _tokenize(self, captions: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None:
            raise ConfigError("tokenizer: captions were given, but the model has none")
        output = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.max_caption_length if length is None else length,
            truncation=True,
            return_tensors="pt",
        )
        return output.input_ids, output.attention_mask

    def _drop_token_ids(self, ids: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids given by the caller; without a tokenizer id 0 is padding and the empty caption."""
        pad = 0 if self.tokenizer is None else (self.tokenizer.pad_token_id or 0)
        mask = (ids != pad) if self.use_attention_mask else None
        if drop is None:
            return ids, mask
        if self.tokenizer is None:
            empty, empty_mask = torch.zeros_like(ids[:1]), torch.ones_like(ids[:1])
        else:
            empty, empty_mask = self._tokenize([""], ids.shape[1])
        rows = drop.to(ids.device)[:, None]
        ids = torch.where(rows, empty.to(ids), ids)
        return ids, None if mask is None else torch.where(rows, empty_mask.to(mask), mask)

    def _encode_text(
        self, ids: Tensor, mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        assert self.model is not None
        if not self.use_attention_mask or mask is None:
            return self.model(ids.to(device)).last_hidden_state, None
        mask = mask.to(device)
        hidden = self.model(ids.to(device), attention_mask=mask).last_hidden_state
        return hidden, mask.to(torch.bool)

    def _embedded(
        self, context: Tensor, batch_size: int, device: torch.device, drop: Tensor | None
    ) -> tuple[Tensor, None]:
        """A context given by the caller; without it, that of the empty caption, or zeros."""
        if context.ndim != 3:
            raise DataError(f"cond: expected a context [B, L, D], got {list(context.shape)}")
        _check_batch(len(context), batch_size)
        context = context.to(device)
        if drop is None:
            return context, None
        empty = torch.zeros_like(context[:1])
        if self.model is not None and self.tokenizer is not None:
            ids, mask = self._tokenize([""], context.shape[1])
            empty = self._encode_text(ids, mask, device)[0].to(context.dtype)
        return torch.where(drop.to(device)[:, None, None], empty, context), None

    def _classes(
        self, cond: Any, batch_size: int, device: torch.device, drop: Tensor | None
    ) -> Tensor:
        labels = cond if isinstance(cond, Tensor) else _as_integers(cond)
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(f"cond: expected integer classes [B], got {_describe(cond)}")
        _check_batch(len(labels), batch_size)
        rows = self.num_class_embeds
        if isinstance(self.model, ClassEmbedder):
            rows = self.model.num_rows
        if rows is not None and labels.device.type == "cpu" and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= rows:
                raise DataError(f"cond: classes go from {low} to {high}; accepted: 0 to {rows - 1}")
        labels = labels.to(device, torch.int64)
        if drop is None:
            return labels
        return labels.masked_fill(drop.to(device), self._unconditional_class())

    def _unconditional_class(self) -> int:
        if isinstance(self.model, ClassEmbedder):
            if self.model.unconditional_class is None:
                raise ConfigError(
                    "with_unconditional_class: the ClassEmbedder has no row for 'no class', which "
                    "conditioning dropout and guidance need"
                )
            return self.model.unconditional_class
        assert self.num_class_embeds is not None
        return self.num_class_embeds - 1

    def _concat(
        self, cond: Any, batch_size: int, device: torch.device, drop: Tensor | None = None
    ) -> Tensor:
        if not isinstance(cond, Tensor) or cond.ndim != 4:
            raise DataError(f"cond: expected [B, Cc, h, w] to concatenate, got {_describe(cond)}")
        _check_batch(len(cond), batch_size)
        cond = cond.to(device)
        if self.kind == "concat" and self.model is not None:
            cond = self.model(cond)
        if cond.shape[1] != self.concat_channels:
            raise DataError(
                f"cond: expected {self.concat_channels} channels to concatenate (in_channels of "
                f"the UNet less those of z), got {cond.shape[1]}"
            )
        if drop is None:
            return cond
        return cond.masked_fill(drop.to(device)[:, None, None, None], 0)


def caption_length(model: nn.Module | None, tokenizer: Any | None) -> int:
    """The length that captions are padded to: what both can do, at most the paper's 77."""
    limits = [
        getattr(tokenizer, "model_max_length", None),
        getattr(getattr(model, "config", None), "max_length", None),
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
    ]
    if isinstance(model, nn.Module) and hasattr(model, "max_length"):
        limits.append(model.max_length)
    known = [int(limit) for limit in limits if isinstance(limit, int)]
    return min([_DEFAULT_CAPTION_LENGTH, *known]) if known else _DEFAULT_CAPTION_LENGTH


def masks_padding(model: nn.Module | None) -> bool:
    """Whether a text encoder expects a mask of padding: as its config says, else all but CLIP."""
    config = getattr(model, "config", None)
    stated = getattr(config, "use_attention_mask", None)
    if stated is not None:
        return bool(stated)
    kind = getattr(config, "model_type", None)
    return kind is not None and not str(kind).startswith("clip")


def repeat_condition(cond: Any, count: int) -> Any:
    """A condition of one sample for `count` samples; any other is left as it is."""
    if isinstance(cond, Mapping):
        return {name: repeat_condition(part, count) for name, part in cond.items()}
    if isinstance(cond, Tensor):
        return cond.expand(count, *cond.shape[1:]) if len(cond) == 1 else cond
    if isinstance(cond, Sequence) and not isinstance(cond, str) and len(cond) == 1:
        return list(cond) * count
    return cond


def condition_size(cond: Any) -> int:
    """B of a condition.

    Raises:
        DataError: it has no size.
    """
    if isinstance(cond, Mapping) and cond:
        return max(condition_size(part) for part in cond.values())
    if isinstance(cond, Tensor) and cond.ndim:
        return len(cond)
    if isinstance(cond, Sequence) and not isinstance(cond, str):
        return len(cond)
    raise DataError(f"conditioning: expected a batch of conditions, got {_describe(cond)}")


def _cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _check_batch(size: int, batch_size: int) -> None:
    if size != batch_size:
        raise DataError(f"cond: got {size} conditions for {batch_size} samples")


def _as_integers(value: Any) -> Tensor:
    if isinstance(value, Sequence) and all(type(entry) is int for entry in value):
        return torch.tensor(list(value), dtype=torch.int64)
    raise DataError(f"cond: expected integer classes [B], got {_describe(value)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing'}"
    return type(value).__name__
