"""Classes as contexts."""

from __future__ import annotations

import pytest
import torch

from fastldm.errors import ConfigError, DataError
from fastldm.models import ClassEmbedder


def test_a_class_is_a_context_of_one_token(tmp_path) -> None:
    embedder = ClassEmbedder(5, 8)
    labels = torch.tensor([4, 0, 4, embedder.unconditional_class])
    context = embedder(labels)
    assert context.shape == (4, 1, 8)
    assert torch.equal(context[:, 0], embedder.embedding.weight[labels])
    embedder.save_pretrained(tmp_path)
    assert torch.equal(ClassEmbedder.from_pretrained(tmp_path)(labels), context)


@pytest.mark.parametrize(("unconditional", "rows"), [(True, 1001), (False, 1000)])
def test_the_published_sizes(unconditional: bool, rows: int) -> None:
    embedder = ClassEmbedder(1000, 512, with_unconditional_class=unconditional)
    assert {k: list(v.shape) for k, v in embedder.state_dict().items()} == {
        "embedding.weight": [rows, 512]
    }
    assert embedder.unconditional_class == (1000 if unconditional else None)


def test_bad_labels_are_named() -> None:
    embedder = ClassEmbedder(5, 8)
    with pytest.raises(DataError, match="values from -1 to 6; accepted: 0 to 5"):
        embedder(torch.tensor([6, -1]))
    with pytest.raises(DataError, match=r"expected integers \[B\]"):
        embedder(torch.tensor([[1]]))
    with pytest.raises(DataError, match=r"float32 \[1\]"):
        embedder(torch.tensor([1.0]))
    assert embedder(torch.empty(0, dtype=torch.int64)).shape == (0, 1, 8)
    with pytest.raises(ConfigError, match="num_classes: expected at least 1, got 0"):
        ClassEmbedder(0)
