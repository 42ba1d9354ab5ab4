"""FID: the statistics against the closed form, and its inputs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.metrics import FrechetInceptionDistance, frechet_inception_distance
from fastldm.metrics import fid as fid_module


class Identity(torch.nn.Module):
    """Stands for Inception: 64 numbers of an image are its features."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images.flatten(1)[:, :64].float(),)


@pytest.fixture
def identity_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid_module, "_build_inception", lambda *_: Identity())


def images(count: int, spread: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, spread, (count, 3, 5, 5), generator=generator).to(torch.uint8)


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) (Dowson and Landau 1982)."""
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(sigma_a + sigma_b - 2 * root)


@pytest.mark.usefixtures("identity_features")
def test_batches_give_the_closed_form() -> None:
    a, b = images(150, 200, 0), images(130, 256, 1)
    distance = FrechetInceptionDistance(features=64)
    for batch in a.split(37):
        distance.update_reference(batch)
    distance.update_reference(a[:0])
    for batch in b.split(1):
        distance.update(batch)
    expected = closed_form(*(x.flatten(1)[:, :64].double().numpy() for x in (a, b)))
    assert distance.compute() == pytest.approx(expected, rel=1e-8)


@pytest.mark.usefixtures("identity_features")
def test_equal_sets_are_at_distance_zero() -> None:
    a = images(150, 256, 0)
    distance = FrechetInceptionDistance(features=64)
    distance.update_reference(a)
    distance.update(a)
    assert distance.compute() == pytest.approx(0, abs=1e-4)


@pytest.mark.usefixtures("identity_features")
def test_float_images_are_those_of_their_bytes() -> None:
    a = images(8, 256, 0)
    distance = FrechetInceptionDistance(features=64)
    from_bytes = distance._features(a)
    torch.testing.assert_close(distance._features(a.float() / 127.5 - 1), from_bytes)
    torch.testing.assert_close(
        distance._features(torch.full_like(a, 3).float()).max(), Tensor([255]).double()[0]
    )
    grey = distance._features(a[:, :1])
    torch.testing.assert_close(grey, distance._features(a[:, :1].repeat(1, 3, 1, 1)))


def test_inception_from_a_local_file(inception_weights: Path, tmp_path: Path) -> None:
    """The network is torch-fidelity's, run on the right bytes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    a = images(2, 256, 0)
    expected = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["64"], feature_extractor_weights_path=str(inception_weights)
    )(a)[0]
    distance = FrechetInceptionDistance(inception_weights, features=64)
    torch.testing.assert_close(distance._features(a), expected.double(), rtol=1e-6, atol=1e-7)
    safe = tmp_path / "inception.safetensors"
    save_file(torch.load(inception_weights, weights_only=True), safe)
    again = FrechetInceptionDistance(safe, features=64)
    torch.testing.assert_close(again._features(a), expected.double(), rtol=1e-6, atol=1e-7)


def test_folders_and_tensors_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid_module, "_build_inception", lambda *_: Narrow())
    a, b = images(5, 200, 0), images(4, 256, 1)
    (tmp_path / "deep").mkdir()
    for index, image in enumerate(a):
        folder = tmp_path / "deep" if index % 2 else tmp_path
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = frechet_inception_distance(tmp_path, b, batch_size=2)
    assert found == pytest.approx(frechet_inception_distance(a, b), rel=1e-6)


class Narrow(torch.nn.Module):
    """2048 features of which only the first few vary, so that the root is quick."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        features = torch.zeros(images.shape[0], 2048)
        features[:, :75] = images.flatten(1).float()
        return (features,)


@pytest.mark.usefixtures("identity_features")
def test_images_of_several_sizes_are_read_in_groups(tmp_path: Path) -> None:
    sizes = [(5, 5), (5, 5), (7, 6), (5, 5)]
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (index, 0, 0)).save(tmp_path / f"{index}.png")
    batches = list(fid_module._batches(tmp_path, 32))
    assert [tuple(batch.shape) for batch in batches] == [
        (2, 3, 5, 5),
        (1, 3, 6, 7),
        (1, 3, 5, 5),
    ]


@pytest.mark.usefixtures("identity_features")
def test_bad_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such folder"):
        frechet_inception_distance(tmp_path / "nothing", images(2, 9, 0))
    with pytest.raises(DataError, match="no images"):
        frechet_inception_distance(tmp_path, images(2, 9, 0))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"broken\.png: not a readable image"):
        frechet_inception_distance(tmp_path, images(2, 9, 0))
    distance = FrechetInceptionDistance(features=64)
    with pytest.raises(DataError, match=r"1 or 3 channels, got \[2, 4, 5, 5\]"):
        distance.update(torch.zeros(2, 4, 5, 5))
    with pytest.raises(DataError, match=r"or uint8, got torch\.int64"):
        distance.update(torch.zeros(2, 3, 5, 5, dtype=torch.int64))
    distance.update(images(1, 9, 0))
    distance.update_reference(images(2, 9, 0))
    with pytest.raises(DataError, match="1 compared images; at least 2"):
        distance.compute()


def test_without_weights_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_weights: Path
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ConfigError, match=rf"FID needs {name}.*no network.*weights=…"):
        FrechetInceptionDistance()
    cached = tmp_path / "checkpoints" / name
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(inception_weights.read_bytes())
    FrechetInceptionDistance()


def test_wrong_and_unsafe_weights_are_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pth"
    torch.save({"fc.weight": torch.zeros(2)}, wrong)
    with pytest.raises(CheckpointError, match="not torch-fidelity's Inception weights"):
        FrechetInceptionDistance(wrong)
    evil = tmp_path / "evil.pth"
    torch.save({"fc.weight": re.compile("code")}, evil)
    with pytest.raises(CheckpointError, match="refused"):
        FrechetInceptionDistance(evil)


def test_bad_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"features: expected one of .*2048\), got 100"):
        FrechetInceptionDistance(features=100)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ConfigError, match=r"install fastldm\[train\]"):
        FrechetInceptionDistance()
