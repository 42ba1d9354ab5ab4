"""Image features for a Fréchet distance where Inception's weights are not at hand.

Which of them says most: a network trained on images (`NetworkFeatures`) sees what is in a picture,
as FID does. Random convolutions (`RandomConvFeatures`) need no file and see edges, textures and
shapes of up to their receptive field; that untrained networks rank generative models usefully,
above all far from ImageNet, was found by Naeem et al. (2002.09797). Principal components of pixels
would be the wrong choice: two sets of images of one mean and covariance are equal to them, noise
with the covariance of the images included.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import CheckpointError, ConfigError
from fastldm.storage import load_weights

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_NETWORK_SIDE = 224
_RGB = 3


class RandomConvFeatures(nn.Module):
    """Means and standard deviations of random convolutional feature maps.

    Each stage is a 3×3 convolution with fixed random weights, ReLU and 2×2 average pooling; each of
    its maps gives its mean and its standard deviation over the positions. The same seed gives the
    same weights on every machine.

    Args:
        channels: of the images.
        resolution: side of the images; stages go down to 4×4 maps, at least one.
        width: maps a stage; D = 2 · width · stages.
        seed: of the weights.
    """

    def __init__(self, channels: int, resolution: int, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        stages = max(1, int(math.log2(max(2, resolution / 4))))
        generator = torch.Generator().manual_seed(seed)
        self._weights: list[Tensor] = []
        for stage in range(stages):
            inputs = channels if stage == 0 else width
            weight = torch.randn(width, inputs, 3, 3, generator=generator)
            # Keeps the mean square of what ReLU is given.
            self._weights.append(weight * math.sqrt(2 / (9 * inputs)))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [−1, 1] → [B, D]."""
        h, features = images.float(), []
        for weight in self._weights:
            h = F.relu(F.conv2d(h, weight.to(h.device), padding=1))
            std, mean = torch.std_mean(h, dim=(2, 3), correction=0)
            features += [mean, std]
            if min(h.shape[2:]) > 1:
                h = F.avg_pool2d(h, 2)
        return torch.cat(features, dim=1)


class NetworkFeatures(nn.Module):
    """What a classifier of torchvision gives to its last linear layer, images resized to 224².

    Args:
        name: of the network, such as ``"resnet50"``.
        weights: local file of its weights, ``.pth`` or ``.safetensors``.

    Raises:
        ConfigError: torchvision has no such network, or it has no linear layer.
        CheckpointError: the file is missing, damaged, unsafe or of another network.
    """

    def __init__(self, name: str, weights: str | Path) -> None:
        super().__init__()
        from torchvision import models

        try:
            network: nn.Module = models.get_model(name, weights=None)
        except ValueError:
            raise ConfigError(f"features: torchvision has no network {name!r}") from None
        try:
            network.load_state_dict(load_weights(weights))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"{weights}: not weights of {name}: {reason}") from None
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ConfigError(f"features: {name} has no linear layer to take the input of")
        self._network = network.requires_grad_(False).eval()
        self._found: Tensor = torch.empty(0)
        layers[-1].register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._found = inputs[0].flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [−1, 1] → [B, D]."""
        x = images.float().expand(-1, _RGB, -1, -1)
        side = (_NETWORK_SIDE, _NETWORK_SIDE)
        x = F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (_MEAN, _STD))
        self._network((x * 0.5 + 0.5 - mean) / std)
        return self._found
