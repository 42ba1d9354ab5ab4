"""Attention processors of a whole model, named as in diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from fastldm.errors import ConfigError
from fastldm.modules.attention_processor import AttentionInterface, AttnProcessor, Processor


class AttentionMixin:
    """Reads and exchanges what computes the attentions of a model."""

    def _attentions(self) -> Iterator[tuple[str, AttentionInterface]]:
        """Every attention with the name of its processor."""
        for name, module in cast(nn.Module, self).named_modules():
            if isinstance(module, AttentionInterface):
                yield f"{name}.processor", module

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """What computes each attention, by names such as ``….attn1.processor``."""
        return {name: attention.get_processor() for name, attention in self._attentions()}

    def set_attn_processor(self, processor: Processor | Mapping[str, Processor]) -> None:
        """Let one processor compute all attentions, or each its own.

        Args:
            processor: called as ``processor(attn, hidden_states, encoder_hidden_states=…,
                attention_mask=…)``; or one for each name in `attn_processors`. Those of diffusers
                that compute plain attention are served by fastldm's operators.

        Raises:
            ConfigError: a dict has other names.
        """
        attentions = dict(self._attentions())
        if not isinstance(processor, Mapping):
            processor = dict.fromkeys(attentions, processor)
        if set(processor) != set(attentions):
            wrong = sorted(set(processor) ^ set(attentions))
            raise ConfigError(
                f"processor: expected one for each of {len(attentions)} attentions, got "
                f"{len(processor)}; missing or unknown: {', '.join(wrong[:5])}"
            )
        for name, attention in attentions.items():
            attention.set_processor(processor[name])

    def set_default_attn_processor(self) -> None:
        """Let fastldm's operators compute all attentions."""
        self.set_attn_processor(AttnProcessor())
