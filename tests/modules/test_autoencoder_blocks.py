"""Encoder and decoder levels: sizes, keys and checkpointing."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder as TheirDecoder
from diffusers.models.autoencoders.vae import Encoder as TheirEncoder

from fastldm.errors import ConfigError
from fastldm.modules.autoencoder_blocks import (
    BlockOptions,
    Decoder,
    DownEncoderBlock2D,
    Encoder,
    UpDecoderBlock2D,
)

DOWN = ("AttnDownEncoderBlock2D", "DownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
SHARED = {"block_out_channels": (4, 8), "layers_per_block": 2, "norm_num_groups": 2}


@pytest.mark.parametrize("double_z", [False, True])
@pytest.mark.parametrize("mid_block_add_attention", [False, True])
def test_encoder_is_diffusers(double_z, mid_block_add_attention):
    torch.manual_seed(0)
    options = {"double_z": double_z, "mid_block_add_attention": mid_block_add_attention, **SHARED}
    theirs = TheirEncoder(3, 5, down_block_types=DOWN, **options).double()
    ours = Encoder(3, 5, down_block_types=DOWN, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    assert ours(x).shape == (2, 10 if double_z else 5, 4, 3)


@pytest.mark.parametrize("mid_block_add_attention", [False, True])
def test_decoder_is_diffusers(mid_block_add_attention):
    torch.manual_seed(0)
    options = {"mid_block_add_attention": mid_block_add_attention, **SHARED}
    theirs = TheirDecoder(5, 3, up_block_types=UP, **options).double()
    ours = Decoder(5, 3, up_block_types=UP, **options).double()
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(z), theirs(z), rtol=1e-11, atol=1e-11)


def test_levels_change_the_resolution_where_asked():
    x = torch.randn(1, 4, 8, 8)
    level = {"in_channels": 4, "out_channels": 6, "num_layers": 1, "options": BlockOptions(2)}
    assert DownEncoderBlock2D(**level)(x).shape == (1, 6, 4, 4)
    assert DownEncoderBlock2D(**level, add_downsample=False)(x).shape == (1, 6, 8, 8)
    assert UpDecoderBlock2D(**level)(x).shape == (1, 6, 16, 16)
    assert UpDecoderBlock2D(**level, add_upsample=False)(x).shape == (1, 6, 8, 8)


def test_resampling_without_convolutions_averages_and_repeats():
    torch.manual_seed(0)
    options = BlockOptions(2, resample_with_conv=False)
    x = torch.randn(1, 4, 8, 8)
    down = DownEncoderBlock2D(4, 6, 1, options)
    assert not list(down.downsamplers.parameters())
    averages = down.resnets[0](x).unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(down(x), averages)
    up = UpDecoderBlock2D(4, 6, 1, options)
    assert not list(up.upsamplers.parameters())
    repeated = up.resnets[0](x).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(up(x), repeated)


def test_dropout_reaches_every_residual_block():
    encoder = Encoder(3, 4, down_block_types=DOWN, **SHARED, dropout=0.5)
    decoder = Decoder(4, 3, up_block_types=UP, **SHARED, dropout=0.5)
    rates = [
        module.p
        for part in (encoder, decoder)
        for name, module in part.named_modules()
        if name.endswith(".dropout")
    ]
    assert rates == [0.5] * (2 * 2 + 2 + 2 * 3 + 2)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_checkpointing_recomputes_blocks_only_when_gradients_are_wanted(part):
    torch.manual_seed(0)
    if part == "encoder":
        module = Encoder(3, 4, down_block_types=DOWN, **SHARED)
    else:
        module = Decoder(3, 4, up_block_types=UP, **SHARED)
    x = torch.randn(2, 3, 8, 8)
    upstream = torch.randn_like(module(x))
    runs = []
    module.mid_block.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for enabled, forwards in ((False, 1), (True, 2)):
        module.gradient_checkpointing = enabled
        module.zero_grad()
        module(x).backward(upstream)
        assert len(runs) == forwards
        runs.clear()
        gradients.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        module(x)
    assert len(runs) == 1


def test_unknown_and_ill_fitting_levels_are_refused():
    with pytest.raises(ConfigError, match="down_block_types: 1 block types for 2"):
        Encoder(3, 4, down_block_types=DOWN[:1], **SHARED)
    with pytest.raises(ConfigError, match=r"up_block_types: expected .* got 'DownEncoderBlock2D'"):
        Decoder(3, 4, up_block_types=("DownEncoderBlock2D",) * 2, **SHARED)
    with pytest.raises(ConfigError, match=r"attention_type: expected .* got 'gated'"):
        Encoder(3, 4, down_block_types=DOWN, **SHARED, attention_type="gated")
    with pytest.raises(ConfigError, match=r"norm_type: the spatial norm .* got 0\.0 and 'linear'"):
        Decoder(3, 4, up_block_types=UP, **SHARED, spatial_norm=True, attention_type="linear")
