"""The strength of loaded LoRA layers for one call, as ``cross_attention_kwargs`` gives it."""

from __future__ import annotations

from typing import Any

from torch import nn


class LoraScale:
    """In its block, every LoRA layer that PEFT has put into `model` is `scale` times as strong."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        modules: list[Any] = list(model.modules()) if scale != 1 else []
        self._scale = scale
        self._layers = [module for module in modules if hasattr(module, "scale_layer")]
        self._strengths = [dict(layer.scaling) for layer in self._layers]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.scale_layer(self._scale)

    def __exit__(self, *_: object) -> None:
        for layer, strengths in zip(self._layers, self._strengths, strict=True):
            layer.scaling.update(strengths)
