"""Transformer blocks against their formulas in float64, and against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock as TheirBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel as TheirTransformer
from torch import Tensor

from fastldm.errors import ConfigError
from fastldm.modules.transformer import (
    GEGLU,
    BasicTransformerBlock,
    FeedForward,
    Transformer2DModel,
)


def test_feed_forward_is_the_formula() -> None:
    module = FeedForward(6, mult=2).double()
    assert set(module.state_dict()) == {
        f"net.{layer}.{kind}" for layer in ("0.proj", "2") for kind in ("weight", "bias")
    }
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    first, last = module.net[0], module.net[2]
    assert isinstance(first, GEGLU)
    value, gate = F.linear(x, first.proj.weight, first.proj.bias).split(12, dim=-1)
    exact_gelu = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(module(x), last(value * exact_gelu))


def test_feed_forward_drops_out_only_in_training() -> None:
    module, x = FeedForward(6, dropout=0.5), torch.randn(4, 6)
    assert torch.equal(module.eval()(x), module(x))
    assert not torch.equal(module.train()(x), module(x))


@pytest.mark.parametrize("only_cross_attention", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
def test_block_against_diffusers(only_cross_attention: bool, attention_bias: bool) -> None:
    torch.manual_seed(0)
    options = {
        "cross_attention_dim": 10,
        "attention_bias": attention_bias,
        "only_cross_attention": only_cross_attention,
    }
    reference = TheirBlock(12, 3, 4, **options).eval()
    module = BasicTransformerBlock(12, 3, 4, **options).eval()
    module.load_state_dict(reference.state_dict())
    x, context = torch.randn(2, 9, 12), torch.randn(2, 5, 10)
    torch.testing.assert_close(
        module(x, context),
        reference(x, encoder_hidden_states=context),
        rtol=1e-5,
        atol=1e-6,
    )


CASES: dict[str, dict[str, Any]] = {
    "convolutions": {},
    "linear": {"use_linear_projection": True},
    "deep": {"num_layers": 3},
    "no blocks": {"num_layers": 0},
    "upcast": {"upcast_attention": True},
    "narrower inside": {"attention_head_dim": 3},
}


def pair(options: dict[str, Any]) -> tuple[Transformer2DModel, TheirTransformer]:
    torch.manual_seed(0)
    options = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": 8,
        "cross_attention_dim": 10,
        "norm_num_groups": 4,
        **options,
    }
    reference = TheirTransformer(**options).eval()
    module = Transformer2DModel(**options).eval()
    module.load_state_dict(reference.state_dict())
    return module, reference


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_transformer_against_diffusers(name: str, layout: torch.memory_format) -> None:
    module, reference = pair(CASES[name])
    x = torch.randn(2, 8, 3, 5).to(memory_format=layout).requires_grad_()
    context = torch.randn(2, 5, 10)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    actual = module(x, context, encoder_attention_mask=mask)
    expected = reference(x, context, encoder_attention_mask=mask).sample
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.is_contiguous(memory_format=layout)

    upstream = torch.randn_like(expected)

    def gradients(output: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
        tracked = {"x": x, **dict(model.named_parameters())}
        values = torch.autograd.grad(output, list(tracked.values()), upstream)
        return dict(zip(tracked, values, strict=True))

    actual_gradients = gradients(actual, module)
    for key, gradient in gradients(expected, reference).items():
        torch.testing.assert_close(actual_gradients[key], gradient, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_recomputes_each_block() -> None:
    module, _ = pair({"num_layers": 2})
    x, context, upstream = torch.randn(2, 8, 3, 5), torch.randn(2, 5, 10), torch.randn(2, 8, 3, 5)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for block in module.transformer_blocks:
        block.register_forward_pre_hook(count)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x, context), list(module.parameters()), upstream)

    expected = gradients()
    assert calls == 2
    module.gradient_checkpointing = True
    assert all(map(torch.equal, gradients(), expected))
    assert calls == 6
    with torch.no_grad():
        module(x, context)
    assert calls == 8


def test_groups_that_do_not_divide_the_channels() -> None:
    with pytest.raises(ConfigError, match="norm_num_groups"):
        Transformer2DModel(2, 4, 8, 10, norm_num_groups=3)
