"""LPIPS against its formula, and what happens without its backbone."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.losses import LPIPS, FirstStageLoss, FirstStageLossConfig


@pytest.fixture(scope="module")
def network(squeezenet_weights: Path) -> LPIPS:
    return LPIPS("squeeze", squeezenet_weights)


def images(channels: int = 3, size: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, channels, size, size)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


def by_formula(x: Tensor, y: Tensor, backbone: Path) -> Tensor:
    """Zhang et al. 2018, eq. 1, on torchvision's SqueezeNet, in float64."""
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trunk = torchvision.models.squeezenet1_1(weights=None)
    trunk.load_state_dict(torch.load(backbone, weights_only=True))
    trunk = trunk.double().eval()
    linear = torch.load(
        Path(lpips.__file__).parent / "weights/v0.1/squeeze.pth",
        weights_only=True,
        map_location="cpu",
    )
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
    total = torch.zeros(x.shape[0], dtype=torch.float64)
    features = [(image - shift) / scale for image in (x, y)]
    ends = [1, 4, 7, 9, 10, 11, 12]
    for index, layer in enumerate(trunk.features):
        features = [layer(feature) for feature in features]
        if index in ends:
            unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in features]
            weight = linear[f"lin{ends.index(index)}.model.1.weight"].double()
            distance = nn.functional.conv2d((unit[0] - unit[1]).square(), weight)
            total = total + distance.mean((1, 2, 3))
    return total


def test_distance_and_gradient_are_the_formula(network: LPIPS, squeezenet_weights: Path) -> None:
    x, y = images()
    y.requires_grad_()
    upstream = torch.randn(2, dtype=torch.float64)
    found, expected = network(x, y), by_formula(x, y, squeezenet_weights)
    assert found.shape == (2,)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(value, y, upstream)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-12)


def test_float32_is_near_float64(network: LPIPS) -> None:
    x, y = images()
    exact = network(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(x.float(), y.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)
    assert network(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_equal_images_have_no_distance(network: LPIPS) -> None:
    x, _ = images()
    assert network(x, x).abs().max().item() == 0


def test_grey_images_are_repeated(network: LPIPS) -> None:
    x, y = images(1)
    repeated = [image.repeat(1, 3, 1, 1) for image in (x, y)]
    torch.testing.assert_close(network(x, y), network(*repeated), rtol=0, atol=0)


def test_other_channel_counts_need_a_choice(network: LPIPS, squeezenet_weights: Path) -> None:
    x, y = images(5)
    with pytest.raises(DataError, match=r"the images have 5; give perceptual_channels"):
        network(x, y)
    chosen = LPIPS("squeeze", squeezenet_weights, channels=[4, 0, 2])
    torch.testing.assert_close(
        chosen(x, y), network(x[:, [4, 0, 2]], y[:, [4, 0, 2]]), rtol=0, atol=0
    )
    with pytest.raises(DataError, match=r"names a channel that images of 4 channels do not have"):
        chosen(x[:, :4], y[:, :4])
    with pytest.raises(ConfigError, match="perceptual_channels: expected three"):
        LPIPS("squeeze", squeezenet_weights, channels=[0, 1])


def test_the_network_is_frozen_and_hidden(squeezenet_weights: Path) -> None:
    loss = FirstStageLoss(
        FirstStageLossConfig(perceptual_net="squeeze", perceptual_weights=str(squeezenet_weights))
    )
    assert list(loss.state_dict()) == ["logvar"]
    assert [name for name, _ in loss.named_parameters()] == ["logvar"]
    loss.train()
    assert loss.perceptual is not None
    (hidden,) = loss.perceptual._frozen
    assert not any(module.training for module in hidden.modules())
    assert not any(parameter.requires_grad for parameter in hidden.parameters())
    FirstStageLoss(loss.config).load_state_dict(loss.state_dict())


def test_construction_leaves_the_random_generator_alone(squeezenet_weights: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    LPIPS("squeeze", squeezenet_weights)
    assert torch.equal(torch.rand(3), expected)


def test_safetensors_backbone(network: LPIPS, squeezenet_weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_file(torch.load(squeezenet_weights, weights_only=True), path)
    x, y = images()
    torch.testing.assert_close(LPIPS("squeeze", path)(x, y), network(x, y), rtol=0, atol=0)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_the_other_backbones_load(net: str, tmp_path: Path) -> None:
    """Their convolutions alone, without the classifier, are a valid file."""
    import torchvision

    builder = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[net]
    with torch.device("meta"):
        shapes = builder(weights=None).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    state_dict = {
        f"features.{name}": torch.randn(value.shape, generator=generator) * 0.05
        for name, value in shapes.items()
    }
    path = tmp_path / f"{net}.safetensors"
    save_file(state_dict, path)
    network = LPIPS(net, path)
    x, y = images(size=32, dtype=torch.float32)
    assert (network(x, y) > 0).all()
    smallest = {"vgg": 16, "alex": 31}[net]
    network(x[..., :smallest, :smallest], y[..., :smallest, :smallest])
    with pytest.raises(DataError, match=f"{smallest}×{smallest} or larger"):
        network(x[..., : smallest - 1], y[..., : smallest - 1])


def test_smallest_squeezenet_image(network: LPIPS) -> None:
    x, y = images(size=17)
    assert network(x, y).isfinite().all()
    with pytest.raises(DataError, match=r"17×17 or larger, got 16×17.*perceptual_weight: 0"):
        network(x[..., :16, :], y[..., :16, :])


def test_shapes_must_agree(network: LPIPS) -> None:
    x, y = images()
    with pytest.raises(DataError, match="of one shape"):
        network(x, y[:1])


def test_without_a_backbone_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ConfigError) as caught:
        FirstStageLoss(FirstStageLossConfig())
    message = str(caught.value)
    assert "vgg16-397923af.pth" in message
    assert "no network" in message
    assert "path/to/vgg16.pth or .safetensors: loss.perceptual_weights" in message
    assert "perceptual_weight: 0" in message
    FirstStageLoss(FirstStageLossConfig(perceptual_weight=0.0))


def test_a_cached_backbone_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeezenet_weights: Path, network: LPIPS
) -> None:
    cached = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir()
    cached.write_bytes(squeezenet_weights.read_bytes())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    x, y = images()
    torch.testing.assert_close(LPIPS("squeeze")(x, y), network(x, y), rtol=0, atol=0)


def test_wrong_and_unsafe_files_are_refused(tmp_path: Path, squeezenet_weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*squeezenet1_1"):
        LPIPS("squeeze", tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"not torchvision's alexnet weights: features\.0"):
        LPIPS("alex", squeezenet_weights)
    evil = tmp_path / "evil.pth"
    torch.save({"features.0.weight": re.compile("code")}, evil)
    with pytest.raises(CheckpointError, match="refused"):
        LPIPS("squeeze", evil)


def test_bad_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="net: expected one of vgg, alex, squeeze, got 'resnet'"):
        LPIPS("resnet")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match=r"install fastldm\[train\] or set perceptual_weight: 0"):
        LPIPS("vgg")
