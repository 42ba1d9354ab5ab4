"""Building blocks: residual block, transformer block, and the middle block of a first stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.contestants import PEERS, Results, contestants, gradients
from benchmarks.timing import Race
from fastldm.modules.autoencoder_blocks import AutoencoderMidBlock2D, BlockOptions
from fastldm.modules.resnet import ResnetBlock2D
from fastldm.modules.transformer import BasicTransformerBlock

ROUNDS = 11


@dataclass(frozen=True)
class Block:
    """Of Stable Diffusion's second level, or of a first stage's last."""

    ours: Callable[[], nn.Module]
    diffusers: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    """Of what it is called with."""


def _diffusers_resnet() -> nn.Module:
    resnet = pytest.importorskip("diffusers.models.resnet")
    block: nn.Module = resnet.ResnetBlock2D(in_channels=320, temb_channels=1280)
    return block


def _diffusers_transformer() -> nn.Module:
    attention = pytest.importorskip("diffusers.models.attention")
    block: nn.Module = attention.BasicTransformerBlock(320, 8, 40, cross_attention_dim=768)
    return block


class _WithoutTime(nn.Module):
    """A first stage's blocks are given no time embedding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


def _diffusers_mid_block() -> nn.Module:
    blocks = pytest.importorskip("diffusers.models.unets.unet_2d_blocks")
    return _WithoutTime(blocks.UNetMidBlock2D(256, temb_channels=None, attention_head_dim=256))


BLOCKS = {
    "ResnetBlock2D": Block(
        lambda: ResnetBlock2D(in_channels=320, temb_channels=1280),
        _diffusers_resnet,
        ((2, 320, 32, 32), (2, 1280)),
    ),
    "BasicTransformerBlock": Block(
        lambda: BasicTransformerBlock(320, 8, 40, cross_attention_dim=768),
        _diffusers_transformer,
        ((2, 1024, 320), (2, 77, 768)),
    ),
    "VAE mid block": Block(
        lambda: _WithoutTime(AutoencoderMidBlock2D(256, BlockOptions(32), add_attention=True)),
        _diffusers_mid_block,
        ((1, 256, 32, 32),),
    ),
}


def _called(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The transformer block of diffusers takes its context by name."""
    if len(inputs) > 1 and inputs[1].ndim == 3:
        out: Tensor = network(inputs[0], encoder_hidden_states=inputs[1])
    else:
        out = network(*inputs)
    return out


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_forward(name: str, peers: Sequence[str], race: Race, device: str) -> None:
    block = BLOCKS[name]
    inputs = [torch.randn(shape, device=device) for shape in block.shapes]

    @torch.no_grad()
    def work(network: nn.Module) -> Results:
        return (_called(network, inputs),)

    race(contestants(block.ours().to(device), work, peers, block.diffusers), ROUNDS)


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_forward_and_backward(name: str, peers: Sequence[str], race: Race, device: str) -> None:
    block = BLOCKS[name]
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in block.shapes]

    def work(network: nn.Module) -> Results:
        return gradients(_called(network, inputs), inputs, network)

    race(contestants(block.ours().to(device), work, peers, block.diffusers), ROUNDS)
