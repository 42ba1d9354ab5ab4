"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) as a frozen distance between images.

The `lpips` package brings the calibrated linear weights; the torchvision backbone comes from
torch.hub's cache, a download or a local file, and is never unpickled with code in it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.losses.pretrained import cached_download, is_cached
from fastldm.storage import load_weights

_BACKBONE_URLS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
_BACKBONE_NAMES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
_SMALLEST_IMAGE = {"vgg": 16, "alex": 31, "squeeze": 17}
_GREY, _RGB = 1, 3


class LPIPS(nn.Module):
    """Learned perceptual distance; the network is frozen, in eval mode and in no state dict.

    Neither the parameters nor the state dict of this module, or of one that holds it, list the
    network, so that optimisers, EMA, DDP and checkpoints do not see it. It computes in float32
    (float64 for float64 images), on the device of the images, also under autocast.

    Args:
        net: backbone, ``"vgg"`` (the one for training first stages), ``"alex"`` (the usual one
            for evaluation) or ``"squeeze"``.
        weights: local file of torchvision's ImageNet weights for the backbone (vgg16, alexnet,
            squeezenet1_1), ``.pth`` or ``.safetensors``. None takes torch.hub's cache or downloads.
        channels: three channel indices to show to the network, for images of neither one nor
            three channels. Grey images are repeated to three channels.

    Raises:
        ConfigError: `net` or `channels` is not accepted, lpips is not installed, or the backbone
            is neither given, cached nor downloadable.
        CheckpointError: the local file is damaged, unsafe or of another backbone.
    """

    def __init__(
        self,
        net: str = "vgg",
        weights: str | Path | None = None,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if net not in _BACKBONE_URLS:
            raise ConfigError(f"net: expected one of {', '.join(_BACKBONE_URLS)}, got {net!r}")
        if channels is not None and (len(channels) != _RGB or min(channels) < 0):
            raise ConfigError(
                f"perceptual_channels: expected three channel indices, got {list(channels)}"
            )
        self.net = net
        self.channels = None if channels is None else list(channels)
        # A tuple, because a module set as an attribute would enter parameters() and state_dict().
        self._frozen = (_build_network(net, weights),)

    @staticmethod
    def is_available(net: str) -> bool:
        """Whether torch.hub's cache holds the weights of a backbone, so that none is downloaded."""
        return is_cached(_BACKBONE_URLS[net])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [B] between images x and y [B, C, H, W] with values in [−1, 1].

        Raises:
            DataError: shapes differ, the images are smaller than the network can take, or their
                channel count needs `channels`.
        """
        if x.shape != y.shape or x.ndim != 4:
            raise DataError(
                f"LPIPS: expected two batches [B, C, H, W] of one shape, got {list(x.shape)} "
                f"and {list(y.shape)}"
            )
        smallest = _SMALLEST_IMAGE[self.net]
        if min(x.shape[2:]) < smallest:
            raise DataError(
                f"LPIPS with net={self.net!r} takes images of {smallest}×{smallest} or larger, "
                f"got {x.shape[2]}×{x.shape[3]}; use larger images or set perceptual_weight: 0"
            )
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            network = self._frozen[0].to(device=x.device, dtype=dtype)
            distance: Tensor = network(self._as_rgb(x).to(dtype), self._as_rgb(y).to(dtype))
        return distance.flatten()

    def _as_rgb(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        if channels == _GREY:
            return x.expand(-1, _RGB, -1, -1)
        if self.channels is not None:
            if max(self.channels) >= channels:
                raise DataError(
                    f"perceptual_channels: {self.channels} names a channel that images of "
                    f"{channels} channels do not have"
                )
            return x[:, self.channels]
        if channels != _RGB:
            raise DataError(
                f"LPIPS sees 1 or 3 channels, the images have {channels}; give "
                "perceptual_channels: three channel indices to compare, or set perceptual_weight: 0"
            )
        return x


def _build_network(net: str, weights: str | Path | None) -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise ConfigError(
            f"LPIPS needs the packages lpips and torchvision ({error}); install fastldm[train] "
            "or set perceptual_weight: 0"
        ) from None
    path = Path(weights) if weights is not None else _cached_backbone(net)
    if not path.is_file():
        raise ConfigError(
            f"LPIPS with net={net!r}: there is no file {path}, which was given for the weights of "
            f"torchvision's {_BACKBONE_NAMES[net]}"
        )
    state_dict = load_weights(path)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The random initialisation is overwritten, and must not shift the caller's generator.
        warnings.simplefilter("ignore")
        network: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _load_backbone(network.get_submodule("net"), state_dict, net, path)
    return network.requires_grad_(False).eval()


def _cached_backbone(net: str) -> Path:
    name = _BACKBONE_NAMES[net]
    return cached_download(
        _BACKBONE_URLS[net],
        purpose=f"LPIPS with net={net!r}",
        remedy=f"give torchvision's {name} weights as a local file "
        f"(path/to/{name}.pth or .safetensors: loss.perceptual_weights in training, "
        "lpips_weights in evaluate), or do without it (loss.perceptual_weight: 0)",
    )


def _load_backbone(
    backbone: nn.Module, state_dict: Mapping[str, Tensor], net: str, path: str | Path
) -> None:
    """Copy torchvision's ``features.N.…`` into lpips's slices, ``sliceK.N.…``."""
    wanted = backbone.state_dict()
    source_of = {key: re.sub(r"^slice\d+\.", "features.", key) for key in wanted}
    problems = []
    for key, source in source_of.items():
        if source not in state_dict:
            problems.append(f"{source} is missing")
        elif state_dict[source].shape != wanted[key].shape:
            problems.append(
                f"{source} is {list(state_dict[source].shape)}, expected {list(wanted[key].shape)}"
            )
    if problems:
        raise CheckpointError(
            f"{path}: not torchvision's {_BACKBONE_NAMES[net]} weights: {'; '.join(problems[:3])}"
        )
    backbone.load_state_dict({key: state_dict[source] for key, source in source_of.items()})
