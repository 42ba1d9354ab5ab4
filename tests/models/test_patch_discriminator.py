"""PatchDiscriminator: taming's layout, its receptive field, its initialisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastldm.errors import ConfigError, DataError, TrainingError
from fastldm.models import PatchDiscriminator

CONVOLUTIONS = {0: (64, 3), 2: (128, 64), 5: (256, 128), 8: (512, 256), 11: (1, 512)}
NORMALISED = {3: 128, 6: 256, 9: 512}
NORMALISATIONS = ["batch", "actnorm", "instance", "group", None]


def taming_keys(normalization: str | None) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {}
    for index, (out_channels, in_channels) in CONVOLUTIONS.items():
        keys[f"main.{index}.weight"] = (out_channels, in_channels, 4, 4)
        if normalization != "batch" or index in (0, 11):
            keys[f"main.{index}.bias"] = (out_channels,)
    for index, channels in NORMALISED.items():
        if normalization == "batch":
            for name in ("weight", "bias", "running_mean", "running_var"):
                keys[f"main.{index}.{name}"] = (channels,)
            keys[f"main.{index}.num_batches_tracked"] = ()
        elif normalization == "actnorm":
            keys[f"main.{index}.loc"] = keys[f"main.{index}.scale"] = (1, channels, 1, 1)
            keys[f"main.{index}.initialized"] = ()
    return keys


@pytest.mark.parametrize("normalization", ["batch", "actnorm"])
def test_state_dict_is_tamings(normalization: str) -> None:
    with torch.device("meta"):
        model = PatchDiscriminator(normalization=normalization)
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == taming_keys(normalization)


def test_two_layers_are_the_smaller_published_one() -> None:
    model = PatchDiscriminator(base_channels=4, num_layers=2)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    strides = [m.stride[0] for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (widths, strides) == ([4, 8, 16, 1], [2, 2, 1, 1])
    deep = PatchDiscriminator(base_channels=2, num_layers=5)
    widths = [m.out_channels for m in deep.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 1]


def test_a_logit_sees_70_pixels() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(base_channels=4, normalization=None)
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = model(x)
    assert logits.shape == (1, 1, 14, 14)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], x)
    seen = gradient.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


@pytest.mark.parametrize("normalization", NORMALISATIONS)
def test_forward_is_the_chain_of_its_layers(normalization: str | None) -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(2, 4, 2, normalization).double()
    x = torch.randn(3, 2, 20, 28, dtype=torch.float64)
    weights = dict(model.named_parameters())
    h = F.leaky_relu(F.conv2d(x, weights["main.0.weight"], weights["main.0.bias"], 2, 1), 0.2)
    for index, stride in ((2, 2), (5, 1)):
        h = F.conv2d(
            h, weights[f"main.{index}.weight"], weights.get(f"main.{index}.bias"), stride, 1
        )
        over = {"batch": (0, 2, 3), "actnorm": (0, 2, 3), "instance": (2, 3)}.get(normalization)
        if normalization == "group":
            grouped = h.unflatten(1, ({2: 8, 5: 16}[index], -1))
            mean, variance = (
                grouped.mean((2, 3, 4), keepdim=True),
                grouped.var((2, 3, 4), keepdim=True, correction=0),
            )
            h = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        elif normalization == "actnorm":
            fixed = h.detach()
            h = (h - fixed.mean(over, keepdim=True)) / (fixed.std(over, keepdim=True) + 1e-6)
        elif over is not None:
            variance = h.var(over, keepdim=True, correction=0)
            h = (h - h.mean(over, keepdim=True)) / (variance + 1e-5).sqrt()
        if normalization == "batch":
            scale, shift = weights[f"main.{index + 1}.weight"], weights[f"main.{index + 1}.bias"]
            h = h * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        h = F.leaky_relu(h, 0.2)
    expected = F.conv2d(h, weights["main.8.weight"], weights["main.8.bias"], 1, 1)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    upstream = torch.randn_like(found)
    gradients = [
        torch.autograd.grad(logits, weights["main.0.weight"], upstream)[0]
        for logits in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_weights_start_from_a_narrow_normal() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(base_channels=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(module.weight.mean().item()) < 0.001
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert module.bias.abs().max().item() == 0


@pytest.mark.parametrize("normalization", NORMALISATIONS)
def test_save_and_load(normalization: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(1, 4, 2, normalization)
    x = torch.randn(2, 1, 16, 16)
    model(x)
    model.eval().save_pretrained(tmp_path)
    loaded = PatchDiscriminator.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(model.config)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_actnorm_before_any_training_batch_is_refused() -> None:
    model = PatchDiscriminator(base_channels=4, num_layers=2, normalization="actnorm").eval()
    with pytest.raises(TrainingError, match="not initialised"):
        model(torch.randn(1, 3, 16, 16))


def test_converts_to_sync_batch_norm() -> None:
    model = PatchDiscriminator(base_channels=4, num_layers=2)
    keys = set(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 2
    assert set(converted.state_dict()) == keys


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_image(num_layers: int) -> None:
    model = PatchDiscriminator(base_channels=2, num_layers=num_layers, normalization=None)
    size = 3 * 2**num_layers
    assert model(torch.randn(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises(DataError, match=rf"{size}×{size} or larger, got {size}×{size - 1}"):
        model(torch.randn(1, 3, size, size - 1))


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match=r"expected \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        PatchDiscriminator(base_channels=2)(torch.randn(1, 1, 32, 32))
    with pytest.raises(ConfigError, match="num_layers: expected a whole number ≥ 1, got 0"):
        PatchDiscriminator(num_layers=0)
    with pytest.raises(ConfigError, match=r"normalization: expected one of batch, .*'layer'"):
        PatchDiscriminator(normalization="layer")  # type: ignore[arg-type]
