"""ResnetBlock2D against diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D as TheirBlock

from fastldm.errors import ConfigError
from fastldm.modules.resnet import ResnetBlock2D

CASES = {
    "same channels": {"in_channels": 8, "temb_channels": None},
    "wider": {"in_channels": 8, "out_channels": 12, "temb_channels": 10},
    "scale and shift": {
        "in_channels": 8,
        "out_channels": 12,
        "temb_channels": 10,
        "time_embedding_norm": "scale_shift",
        "groups_out": 3,
    },
    "up": {"in_channels": 8, "temb_channels": 10, "up": True},
    "down, with a shortcut": {
        "in_channels": 8,
        "temb_channels": 10,
        "down": True,
        "use_in_shortcut": True,
        "conv_shortcut_bias": False,
    },
    "other activation, scaled": {
        "in_channels": 8,
        "temb_channels": 10,
        "non_linearity": "gelu",
        "output_scale_factor": 1.7,
        "skip_time_act": True,
        "eps": 1e-3,
    },
    "wider second convolution": {
        "in_channels": 8,
        "temb_channels": 10,
        "conv_2d_out_channels": 6,
    },
}


@pytest.fixture(params=CASES)
def blocks(request):
    torch.manual_seed(0)
    config = {"groups": 4, **CASES[request.param]}
    theirs = TheirBlock(**config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    ours = ResnetBlock2D(**config)
    ours.load_state_dict(theirs.state_dict())
    return theirs.double(), ours


def inputs(blocks, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 6, 10, generator=generator, dtype=torch.float64) + 1.0
    temb = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    with_time = blocks[0].time_emb_proj is not None
    return x.to(dtype), temb.to(dtype) if with_time else None


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_outputs_and_gradients_are_diffusers(blocks, dtype, tolerance):
    theirs, ours = blocks[0], blocks[1].to(dtype)
    results = []
    for block, block_dtype in ((theirs, torch.float64), (ours, dtype)):
        x, temb = inputs(blocks, block_dtype)
        leaves = [x.requires_grad_()] + ([] if temb is None else [temb.requires_grad_()])
        output = block(x, temb)
        generator = torch.Generator().manual_seed(2)
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        output.backward(upstream.to(output.dtype))
        gradients = [*leaves, *block.parameters()]
        results.append([output.detach(), *(leaf.grad for leaf in gradients)])
    for expected, given in zip(*results, strict=True):
        assert given.dtype == dtype
        error = float((given.double() - expected).abs().max())
        assert error <= tolerance * float(expected.abs().max()) + 10 * tolerance**2


def test_channels_last_stays_channels_last():
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=12, groups=4, temb_channels=None)
    x = torch.randn(2, 8, 4, 6)
    expected = block(x)
    given = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert given.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(given, expected)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=None, dropout=0.5)
    x = torch.randn(1, 8, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_a_missing_time_embedding_is_an_error():
    block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=10)
    with pytest.raises(ValueError, match="temb"):
        block(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_embedding_norm": "spatial"}, "time_embedding_norm.*'spatial'"),
        ({"up": True, "down": True}, "up, down"),
        ({"groups": 3}, "8 channels do not divide into 3 groups"),
        ({"groups": 0}, "groups"),
        ({"non_linearity": "sine"}, "'sine'"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ResnetBlock2D(**{"in_channels": 8, "groups": 4, **change})
