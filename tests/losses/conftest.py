from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def squeezenet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised torchvision SqueezeNet as a local weights file."""
    import torchvision

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        network = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path_factory.mktemp("backbone") / "squeezenet1_1.pth"
    torch.save(network.state_dict(), path)
    return path
