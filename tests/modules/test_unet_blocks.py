"""The levels of a UNet against diffusers' blocks, one type at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets import unet_2d_blocks as theirs
from torch import Tensor, nn

from fastldm.errors import ConfigError
from fastldm.modules.unet_blocks import (
    AttentionOptions,
    Context,
    PlainAttentionOptions,
    ResnetOptions,
    TransformerOptions,
    UNetDownBlock2D,
    UNetMidBlock2D,
    UNetUpBlock2D,
)

RESNET = ResnetOptions(temb_channels=10, groups=4)
PLAIN = PlainAttentionOptions(head_dim=4, groups=4)
TRANSFORMER = TransformerOptions(
    num_heads=2, cross_attention_dim=12, num_layers=(1, 2, 1), groups=4
)
THEIR_RESNET = {"temb_channels": 10, "resnet_groups": 4, "resnet_eps": 1e-5}
THEIR_PLAIN = {"attention_head_dim": 4}
THEIR_TRANSFORMER = {
    "num_attention_heads": 2,
    "cross_attention_dim": 12,
    "transformer_layers_per_block": (1, 2, 1),
}

Kind = tuple[AttentionOptions | None, str | None, str, dict[str, Any]]
DOWN: dict[str, Kind] = {
    "conv": (None, "conv", "DownBlock2D", {}),
    "nothing": (None, None, "DownBlock2D", {"add_downsample": False}),
    "resnet": (None, "resnet", "ResnetDownsampleBlock2D", {}),
    "plain, conv": (PLAIN, "conv", "AttnDownBlock2D", THEIR_PLAIN),
    "plain, resnet": (
        PLAIN,
        "resnet",
        "AttnDownBlock2D",
        {**THEIR_PLAIN, "downsample_type": "resnet"},
    ),
    "transformer": (TRANSFORMER, "conv", "CrossAttnDownBlock2D", THEIR_TRANSFORMER),
}
UP: dict[str, Kind] = {
    "conv": (None, "conv", "UpBlock2D", {}),
    "nothing": (None, None, "UpBlock2D", {"add_upsample": False}),
    "resnet": (None, "resnet", "ResnetUpsampleBlock2D", {}),
    "plain, conv": (PLAIN, "conv", "AttnUpBlock2D", THEIR_PLAIN),
    "plain, resnet": (PLAIN, "resnet", "AttnUpBlock2D", {**THEIR_PLAIN, "upsample_type": "resnet"}),
    "transformer": (TRANSFORMER, "conv", "CrossAttnUpBlock2D", THEIR_TRANSFORMER),
}


def context_for(attention: AttentionOptions | None) -> tuple[Context | None, dict[str, Tensor]]:
    """Ours and diffusers' way to hand over the context."""
    if not isinstance(attention, TransformerOptions):
        return None, {}
    hidden_states = torch.randn(2, 5, 12)
    return Context(hidden_states), {"encoder_hidden_states": hidden_states}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DOWN)
def test_down_block_against_diffusers(name: str) -> None:
    attention, downsampling, their_name, options = DOWN[name]
    torch.manual_seed(0)
    reference = getattr(theirs, their_name)(
        in_channels=4, out_channels=8, num_layers=3, **THEIR_RESNET, **options
    ).eval()
    block = UNetDownBlock2D(4, 8, 3, RESNET, attention, downsampling).eval()
    block.load_state_dict(reference.state_dict())
    x, temb = torch.randn(2, 4, 6, 6), torch.randn(2, 10)
    context, their_context = context_for(attention)
    actual, states = block(x, temb, context)
    expected, their_states = reference(x, temb, **their_context)
    close(actual, expected)
    assert len(states) == len(their_states) == 3 + (downsampling is not None)
    for state, their_state in zip(states, their_states, strict=True):
        close(state, their_state)


def test_additional_residual_comes_before_the_downsampler() -> None:
    torch.manual_seed(0)
    reference = theirs.CrossAttnDownBlock2D(4, 8, num_layers=3, **THEIR_RESNET, **THEIR_TRANSFORMER)
    block = UNetDownBlock2D(4, 8, 3, RESNET, TRANSFORMER)
    block.load_state_dict(reference.state_dict())
    x, temb, residual = torch.randn(2, 4, 6, 6), torch.randn(2, 10), torch.randn(2, 8, 6, 6)
    context, their_context = context_for(TRANSFORMER)
    actual, states = block(x, temb, context, residual)
    expected, their_states = reference(x, temb, **their_context, additional_residuals=residual)
    close(actual, expected)
    close(states[2], their_states[2])


@pytest.mark.parametrize("name", UP)
def test_up_block_against_diffusers(name: str) -> None:
    attention, upsampling, their_name, options = UP[name]
    torch.manual_seed(0)
    reference = getattr(theirs, their_name)(
        in_channels=4,
        prev_output_channel=12,
        out_channels=8,
        num_layers=3,
        **THEIR_RESNET,
        **options,
    ).eval()
    block = UNetUpBlock2D(4, 12, 8, 3, RESNET, attention, upsampling).eval()
    block.load_state_dict(reference.state_dict())
    x, temb = torch.randn(2, 12, 3, 3), torch.randn(2, 10)
    skipped = tuple(torch.randn(2, channels, 3, 3) for channels in (4, 8, 8))
    context, their_context = context_for(attention)
    actual = block(x, skipped, temb, context)
    close(actual, reference(x, skipped, temb, **their_context))
    assert actual.shape[-1] == (3 if upsampling is None else 6)


def test_up_block_to_a_given_size() -> None:
    block = UNetUpBlock2D(4, 12, 8, 2, RESNET)
    skipped = (torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3))
    output = block(torch.randn(2, 12, 3, 3), skipped, torch.randn(2, 10), None, (5, 6))
    assert output.shape == (2, 8, 5, 6)


MID: dict[str, tuple[AttentionOptions | None, int, str, dict[str, Any]]] = {
    "plain": (PLAIN, 1, "UNetMidBlock2D", THEIR_PLAIN),
    "nothing": (None, 1, "UNetMidBlock2D", {"add_attention": False}),
    "one residual block": (None, 0, "UNetMidBlock2D", {"add_attention": False, "num_layers": 0}),
    "transformer": (TRANSFORMER, 1, "UNetMidBlock2DCrossAttn", THEIR_TRANSFORMER),
}


@pytest.mark.parametrize("name", MID)
def test_mid_block_against_diffusers(name: str) -> None:
    attention, num_layers, their_name, options = MID[name]
    torch.manual_seed(0)
    reference = getattr(theirs, their_name)(in_channels=8, **THEIR_RESNET, **options).eval()
    block = UNetMidBlock2D(8, RESNET, attention, num_layers).eval()
    block.load_state_dict(reference.state_dict())
    x, temb = torch.randn(2, 8, 3, 3), torch.randn(2, 10)
    context, their_context = context_for(attention)
    close(block(x, temb, context), reference(x, temb, **their_context))


def test_transformers_need_a_context() -> None:
    block = UNetMidBlock2D(8, RESNET, TRANSFORMER)
    with pytest.raises(ValueError, match="context"):
        block(torch.randn(2, 8, 3, 3), torch.randn(2, 10))


def heads(options: PlainAttentionOptions, channels: int) -> int:
    attention = options.build(channels, 0)
    assert attention.heads * attention.dim_head == channels
    return attention.heads


def test_heads_of_plain_attention() -> None:
    assert heads(PlainAttentionOptions(head_dim=4, groups=4), 16) == 4
    assert heads(PlainAttentionOptions(head_dim=None, groups=4), 16) == 1
    assert heads(PlainAttentionOptions(head_dim=4, groups=4, num_heads=8), 16) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlainAttentionOptions(head_dim=5, groups=4), "attention_head_dim: 16 channels"),
        (PlainAttentionOptions(head_dim=0, groups=4), "attention_head_dim: 16 channels"),
        (PlainAttentionOptions(head_dim=4, groups=4, num_heads=3), "num_attention_heads: 3"),
        (PlainAttentionOptions(head_dim=4, groups=4, num_heads=0), "num_attention_heads: 0"),
        (TransformerOptions(17, 12, (1,), 4), "attention_head_dim: 17 heads"),
        (TransformerOptions(0, 12, (1,), 4), "attention_head_dim: 0 heads"),
    ],
)
def test_heads_that_do_not_fit_the_channels(options: AttentionOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.build(16, 0)


@pytest.mark.parametrize("attention", [None, PLAIN, TRANSFORMER], ids=["none", "plain", "cross"])
def test_gradient_checkpointing_changes_nothing(attention: AttentionOptions | None) -> None:
    torch.manual_seed(0)
    block = UNetDownBlock2D(4, 8, 2, RESNET, attention)
    x, temb = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 10, requires_grad=True)
    context, _ = context_for(attention)
    upstream = torch.randn(2, 8, 3, 3)

    def gradients() -> tuple[Tensor, ...]:
        tracked = [x, temb, *block.parameters()]
        return torch.autograd.grad(block(x, temb, context)[0], tracked, upstream)

    expected = gradients()
    recomputed = 0

    def count(*_: Any) -> None:
        nonlocal recomputed
        recomputed += 1

    resnets: nn.ModuleList = block.resnets
    resnets[0].register_forward_pre_hook(count)
    for module in block.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert all(map(torch.equal, gradients(), expected))
    assert recomputed == 2
