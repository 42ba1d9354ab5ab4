from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's Inception network with random weights, as a local file."""
    from torch_fidelity import feature_extractor_inceptionv3 as home

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(5)
        patch.setattr(home, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(home.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = home.FeatureExtractorInceptionV3("inception-v3-compat", ["64"])
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path
