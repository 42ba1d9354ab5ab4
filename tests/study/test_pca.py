from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from fastldm.study.pca import PrincipalComponents


@pytest.mark.parametrize("numbers", [1, 7, 19])
def test_as_scikit_learn(numbers: int) -> None:
    images = torch.randn(20, 3, 4, 4)
    others = torch.randn(5, 3, 4, 4)
    found = PrincipalComponents(images).reconstruct(others, numbers)
    peer = PCA(numbers, svd_solver="full").fit(images.flatten(1).double().numpy())
    expected = peer.inverse_transform(peer.transform(others.flatten(1).double().numpy()))
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-5)


def test_no_more_components_than_the_images_span() -> None:
    images = torch.randn(6, 1, 4, 4)
    pca = PrincipalComponents(images)
    assert pca.components(3) == 3
    assert pca.components(100) == 5
    torch.testing.assert_close(pca.reconstruct(images, 100), images)
