from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.metrics import (
    FrechetFeatureDistance,
    NetworkFeatures,
    RandomConvFeatures,
    frechet_distance,
)
from fastldm.metrics.frechet import RunningGaussian


def covariance(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T


def discs(count: int) -> Tensor:
    """Filled discs of random place, size and colour on white, [N, 3, 32, 32]."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    place, radius = torch.rand(count, 2, 1, 1) * 12 + 10, torch.rand(count, 1, 1) * 6 + 3
    inside = (rows - place[:, 0]).hypot(columns - place[:, 1]) < radius
    colour = torch.rand(count, 3, 1, 1) * 2 - 1
    return torch.where(inside[:, None], colour, 1.0)


def test_equal_to_the_closed_form() -> None:
    """By the eigenvalues of the product, which is not symmetric; diagonal ones by hand."""
    first, second = covariance(5), covariance(5)
    mean, mean_2 = torch.randn(2, 5, dtype=torch.float64)
    root = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    expected = (mean - mean_2).square().sum() + first.trace() + second.trace() - 2 * root
    assert frechet_distance(mean, first, mean_2, second) == pytest.approx(float(expected))
    assert frechet_distance(mean, first, mean, first) == pytest.approx(0, abs=1e-8)
    # ‖μ‖² + Σ (σ₁ − σ₂)², also where one σ is 0.
    a, b = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 4.0]).double()
    one = torch.ones(3, dtype=torch.float64)
    found = frechet_distance(one, a.diag(), -one, b.diag())
    assert found == pytest.approx(3 * 4 + 1 + 4 + 4)


def test_the_running_gaussian_is_that_of_all_vectors() -> None:
    vectors = torch.randn(50, 4, dtype=torch.float64) + 100
    gaussian = RunningGaussian(4)
    for batch in vectors.split([20, 0, 1, 29]):
        gaussian.update(batch)
    torch.testing.assert_close(gaussian.mean, vectors.mean(0))
    torch.testing.assert_close(gaussian.covariance, vectors.T.cov())


def test_random_convolutions_rank_images_where_second_moments_cannot() -> None:
    images = discs(1200)
    distance = FrechetFeatureDistance(RandomConvFeatures(3, 32))
    for batch in images[:700].split(100):
        distance.update_reference(batch)
    flat = images[:700].flatten(1)
    vectors = torch.randn(500, 700) @ (flat - flat.mean(0)) / 700**0.5
    same_moments = (vectors + flat.mean(0)).view(-1, 3, 32, 32)
    others = images[700:]
    blurred = torch.nn.functional.avg_pool2d(others, 3, 1, 1, count_include_pad=False)
    noisy = others + 0.3 * torch.randn_like(others)
    found = [distance.to(x) for x in (others, blurred, noisy, same_moments)]
    assert found[0] < 0.5 * found[1]
    assert 10 * found[0] < min(found[2:])
    # The same weights wherever they are made, and features that do not depend on the batch.
    again = RandomConvFeatures(3, 32)(others[:3])
    torch.testing.assert_close(again, RandomConvFeatures(3, 32)(others[:9])[:3])
    assert again.shape == (3, 96)


def test_features_that_do_not_vary_are_left_out_and_all_others_count_alike() -> None:
    def features(images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return torch.stack([flat[:, 0], 1000 * flat[:, 1], 0 * flat[:, 2]], dim=1)

    images = torch.rand(400, 1, 2, 2) - 0.5
    distance = FrechetFeatureDistance(features)
    distance.update_reference(images)
    shifted = images.clone()
    shifted[:, :, 0, 0] += 0.25
    spread = images[:, 0, 0, 0].double().std()
    assert distance.to(shifted) == pytest.approx(float((0.25 / spread) ** 2), rel=1e-5)


def test_a_network_of_torchvision(tmp_path: Path) -> None:
    from torchvision.models import shufflenet_v2_x0_5, squeezenet1_1

    path = tmp_path / "weights.pth"
    network = shufflenet_v2_x0_5(weights=None).eval()
    torch.save(network.state_dict(), path)
    found = NetworkFeatures("shufflenet_v2_x0_5", path)(torch.zeros(2, 1, 8, 8))
    assert found.shape == (2, network.fc.in_features)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    grey = ((0.5 - mean) / std).view(1, 3, 1, 1).expand(2, 3, 224, 224)
    with torch.no_grad():
        logits = network(grey)
    torch.testing.assert_close(network.fc(found), logits)
    with pytest.raises(CheckpointError, match="not weights of resnet18"):
        NetworkFeatures("resnet18", path)
    with pytest.raises(ConfigError, match="torchvision has no network 'resnet1'"):
        NetworkFeatures("resnet1", path)
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    with pytest.raises(ConfigError, match="squeezenet1_1 has no linear layer"):
        NetworkFeatures("squeezenet1_1", path)


def test_too_few_images() -> None:
    distance = FrechetFeatureDistance(RandomConvFeatures(3, 8))
    with pytest.raises(DataError, match="0 reference images"):
        distance.to(torch.zeros(4, 3, 8, 8))
    distance.update_reference(torch.zeros(4, 3, 8, 8))
    with pytest.raises(DataError, match="1 compared images"):
        distance.to(torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match="all have the same features"):
        distance.to(torch.rand(4, 3, 8, 8))
