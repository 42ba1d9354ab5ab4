"""Fréchet Inception distance (Heusel et al. 2017, arXiv 1706.08500) through torch-fidelity.

Between originals and reconstructions it is the paper's rFID, between a data set and samples FID.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.losses.pretrained import cached_download
from fastldm.metrics.frechet import RunningGaussian
from fastldm.storage import load_weights

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
_FEATURES = (64, 192, 768, 2048)
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_GREY, _RGB = 1, 3


class FrechetInceptionDistance:
    """FID over any number of batches; only means and covariances are kept.

    Args:
        weights: local file of torch-fidelity's Inception weights (``.pth`` or ``.safetensors``);
            None takes torch.hub's cache or downloads.
        device: where the Inception network runs.
        features: which of its layers; only 2048 is the FID of the literature.

    Raises:
        ConfigError: torch-fidelity is not installed, `features` is not accepted, or the weights
            are neither given, cached nor downloadable.
        CheckpointError: the weights file is damaged, unsafe or of another network.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        features: int = 2048,
    ) -> None:
        if features not in _FEATURES:
            raise ConfigError(f"features: expected one of {_FEATURES}, got {features!r}")
        self.device = torch.device(device)
        self._extractor = _build_inception(weights, features).to(self.device)
        self._reference = RunningGaussian(features)
        self._images = RunningGaussian(features)

    def update_reference(self, images: Tensor) -> None:
        """Add true images [B, C, H, W], float in [−1, 1] or uint8, of 1 or 3 channels.

        Raises:
            DataError: another shape, dtype or channel count.
        """
        self._reference.update(self._features(images))

    def update(self, images: Tensor) -> None:
        """Add reconstructed or sampled images, as `update_reference` takes them."""
        self._images.update(self._features(images))

    def compute(self) -> float:
        """The distance, ≥ 0 but for rounding. It has a bias that shrinks with the number of images.

        Raises:
            DataError: one side has fewer than two images.
        """
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        sides = {"reference": self._reference, "compared": self._images}
        for name, side in sides.items():
            if side.count < 2:
                raise DataError(f"FID: {side.count} {name} images; at least 2 are needed")
        statistics = [side.statistics() for side in sides.values()]
        return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self._extractor(_to_rgb_bytes(images).to(self.device))[0]
        return features.double().cpu()


def frechet_inception_distance(
    reference: Tensor | str | Path,
    images: Tensor | str | Path,
    *,
    weights: str | Path | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> float:
    """FID between two sets of images.

    Args:
        reference: true images [N, C, H, W], float in [−1, 1] or uint8, or a folder of files,
            read with its subfolders.
        images: samples or reconstructions, in the same forms.
        weights, device: as for `FrechetInceptionDistance`.
        batch_size: images that go through the network at once.

    Raises:
        DataError: a folder is missing, empty or holds an unreadable image; fewer than two images.
        ConfigError, CheckpointError: as for `FrechetInceptionDistance`.
    """
    distance = FrechetInceptionDistance(weights, device=device)
    for batch in _batches(reference, batch_size):
        distance.update_reference(batch)
    for batch in _batches(images, batch_size):
        distance.update(batch)
    return distance.compute()


def _build_inception(weights: str | Path | None, features: int) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            f"FID needs the package torch-fidelity ({error}); install fastldm[train]"
        ) from None
    path = (
        weights
        if weights is not None
        else cached_download(
            INCEPTION_URL,
            purpose="FID",
            remedy="give that file as a local path (inception_weights of evaluate, or "
            "FrechetInceptionDistance(weights=…)), or leave FID out",
        )
    )
    state_dict = load_weights(path)
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles without restriction, so it is given a file written here.
        checked = Path(folder, "inception.pth")
        torch.save(state_dict, checked)
        try:
            extractor: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(features)], feature_extractor_weights_path=str(checked)
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(
                f"{path}: not torch-fidelity's Inception weights "
                f"({Path(INCEPTION_URL).name}): {reason}"
            ) from None
    return extractor


def _to_rgb_bytes(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (_GREY, _RGB):
        raise DataError(
            f"FID: expected images [B, C, H, W] of 1 or 3 channels, got {list(images.shape)}"
        )
    if images.is_floating_point():
        images = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    elif images.dtype != torch.uint8:
        raise DataError(f"FID: expected float images in [−1, 1] or uint8, got {images.dtype}")
    return images.expand(-1, _RGB, -1, -1)


def _batches(source: Tensor | str | Path, batch_size: int) -> Iterator[Tensor]:
    if isinstance(source, Tensor):
        yield from torch.split(source, batch_size)
        return
    batch: list[Tensor] = []
    for image in _folder_images(Path(source)):
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    yield torch.stack(batch)


def _folder_images(folder: Path) -> Iterator[Tensor]:
    from torch_fidelity.datasets import ImagesPathDataset

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    images = ImagesPathDataset(paths)
    for index, path in enumerate(paths):
        try:
            yield images[index]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable image ({error})") from None
