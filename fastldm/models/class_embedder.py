"""Classes as a context of one token for cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastldm.configuration import register_to_config
from fastldm.errors import ConfigError, DataError
from fastldm.models.base import ModelMixin


class ClassEmbedder(ModelMixin):
    """A learned vector a class, as in the paper's ImageNet models (appendix E.2.1).

    Args:
        num_classes: number of classes.
        hidden_size: width of the vectors, the UNet's ``cross_attention_dim``.
        with_unconditional_class: add a row at index `num_classes` that stands for "no class" in
            classifier-free guidance. The published model without guidance has none.

    Raises:
        ConfigError: a size is not positive.
    """

    @register_to_config
    def __init__(
        self, num_classes: int, hidden_size: int = 512, with_unconditional_class: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("hidden_size", hidden_size)):
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        self.num_rows = num_classes + with_unconditional_class
        self.unconditional_class = num_classes if with_unconditional_class else None
        self.embedding = nn.Embedding(self.num_rows, hidden_size)

    def forward(self, class_labels: Tensor) -> Tensor:
        """
        Args:
            class_labels: integers [B].

        Returns:
            [B, 1, hidden_size].

        Raises:
            DataError: the labels have another shape or type, or, on the CPU, one is out of range.
        """
        if class_labels.ndim != 1 or class_labels.is_floating_point():
            raise DataError(
                f"class_labels: expected integers [B], got {class_labels.dtype} "
                f"{list(class_labels.shape)}"
            )
        readable = class_labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and class_labels.numel():
            low, high = int(class_labels.min()), int(class_labels.max())
            if low < 0 or high >= self.num_rows:
                raise DataError(
                    f"class_labels: got values from {low} to {high}; accepted: 0 to "
                    f"{self.num_rows - 1}"
                )
        return self.embedding(class_labels)[:, None]
