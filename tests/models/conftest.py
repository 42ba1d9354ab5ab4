"""One comparison with diffusers, in both directions, that all models' tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

Forward = Callable[..., tuple[Tensor, ...]]
Comparison = Callable[..., None]


def sample_of(model: nn.Module, **inputs: Any) -> tuple[Tensor, ...]:
    return (model(**inputs).sample,)


def copied(value: Any) -> Any:
    """Inputs of its own for each model: floating ones ask for gradients, lists may be emptied."""
    if isinstance(value, Tensor):
        value = value.clone()
        return value.requires_grad_() if value.is_floating_point() else value
    if isinstance(value, list):
        return [copied(entry) for entry in value]
    if isinstance(value, dict):
        return {name: copied(entry) for name, entry in value.items()}
    return value


def gradients(
    model: nn.Module, inputs: dict[str, Any], forward: Forward
) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    """Outputs, and gradients of the parameters and of the sample and the context."""
    inputs = copied(inputs)
    tracked = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tracked |= {
        name: v for name, v in inputs.items() if name in ("sample", "encoder_hidden_states")
    }
    outputs = forward(model, **inputs)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(output.shape, generator=generator) for output in outputs]
    values = torch.autograd.grad(outputs, list(tracked.values()), upstream, allow_unused=True)
    return tuple(output.detach() for output in outputs), dict(zip(tracked, values, strict=True))


@pytest.fixture
def compare_with_diffusers(tmp_path: Path) -> Comparison:
    """Weights of diffusers loaded by us, and ours by diffusers: strictly, and the same numbers."""

    def compare(
        ours_class: type[Any],
        config: dict[str, Any],
        inputs: dict[str, Any],
        forward: Forward = sample_of,
    ) -> None:
        theirs_class = getattr(diffusers, ours_class.__name__)
        theirs = theirs_class.from_config(config).eval()
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = ours_class.from_pretrained(tmp_path / "theirs")
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name

        expected, expected_gradients = gradients(theirs, inputs, forward)
        actual, actual_gradients = gradients(ours, inputs, forward)
        for value, wanted in zip(actual, expected, strict=True):
            assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        largest = max(g.abs().max() for g in expected_gradients.values() if g is not None)
        assert set(actual_gradients) == set(expected_gradients)
        for key, gradient in expected_gradients.items():
            value = actual_gradients[key]
            assert (value is None) == (gradient is None), key
            if gradient is not None and value is not None:
                # Some gradients (of a bias before a norm) are zero but for rounding.
                allowed = 1e-4 * max(gradient.abs().max(), 1e-3 * largest)
                assert (value - gradient).abs().max() <= allowed, key

        ours.save_pretrained(tmp_path / "ours")
        back, report = theirs_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.no_grad():
            for value, wanted in zip(forward(back.eval(), **copied(inputs)), expected, strict=True):
                assert torch.equal(value, wanted)

    return compare
