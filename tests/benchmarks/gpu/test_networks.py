"""The networks of a GPU's benchmark are those that they are named after: parameters, shapes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.networks import Build, decoder, sdxl_unet, stable_diffusion_unet


@pytest.mark.parametrize(
    ("build", "parameters", "shape"),
    [
        # Of the published weights; a decoder is held with its encoder.
        (stable_diffusion_unet, 859_520_964, (2, 4, 64, 64)),
        (sdxl_unet, 2_567_463_684, (2, 4, 128, 128)),
        (decoder(512), 83_653_863, (1, 3, 512, 512)),
        (decoder(1024), 83_653_863, (1, 3, 1024, 1024)),
    ],
    ids=["SD 1.5", "SDXL", "decoder 512²", "decoder 1024²"],
)
@torch.no_grad()
def test_full_size_on_the_meta_device(
    build: Build, parameters: int, shape: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        network, inputs = build(False)
        assert sum(weight.numel() for weight in network.parameters()) == parameters
        assert network(*inputs).shape == shape
