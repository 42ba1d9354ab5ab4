"""Counted costs against counts that are made another way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastldm import ops
from fastldm.modules.attention import Attention
from fastldm.profiling import FAMILIES, LDMCosts, LDMSpec, count, ldm_costs, narrow
from fastldm.profiling.costs import count_decoding, count_encoding, count_step, count_training


@contextmanager
def shapes_of_layers(model: nn.Module) -> Iterator[list[int]]:
    """The FLOPs of every layer that is called, from its weights and the shapes that it saw."""
    found: list[int] = []

    def conv(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        pixels = output.shape[0] * output.shape[2] * output.shape[3]
        found.append(2 * kernel * layer.in_channels * layer.out_channels * pixels)

    def linear(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append(
            2 * layer.in_features * layer.out_features * (output.numel() // output.shape[-1])
        )

    def attention(layer: Attention, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        queries = x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[1]
        context = inputs[1] if len(inputs) > 1 else None
        keys = queries if context is None else context.shape[1]
        # Scores, and their sum over values.
        found.append(2 * 2 * x.shape[0] * queries * keys * layer.inner_dim)

    hooks = [
        layer.register_forward_hook(hook)  # type: ignore[arg-type]
        for layer in model.modules()
        for kind, hook in ((nn.Conv2d, conv), (nn.Linear, linear), (Attention, attention))
        if isinstance(layer, kind)
    ]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("conditioning", ["none", "class"])
def test_a_step_has_the_flops_of_its_layers(conditioning: str) -> None:
    spec = narrow(8, "vq", conditioning, image_size=64)
    unet = spec.build_unet().eval()
    with torch.no_grad(), shapes_of_layers(unet) as layers:
        unet(*spec.unet_inputs(1))
    meta, inputs = spec.build_unet("meta"), spec.unet_inputs(1, "meta")
    fused = count_step(meta, inputs, fused=True)
    eager = count_step(meta, inputs, fused=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), ops.backend("reference"):
        spec.build_unet("meta")(*inputs)
    assert fused.total_flops == pytest.approx(sum(layers), rel=0.01)
    assert eager.total_flops == pytest.approx(sum(layers), rel=0.01)
    assert counter.get_total_flops() == pytest.approx(sum(layers), rel=0.01)


@pytest.mark.parametrize("regularization", ["kl", "vq"])
def test_a_first_stage_has_the_flops_of_its_layers(regularization: str) -> None:
    spec = narrow(4, regularization, image_size=32)
    model, z, images = spec.build_first_stage(), spec.unet_inputs(1)[0], spec.images(1)
    assert model is not None
    with torch.no_grad(), shapes_of_layers(model) as encoding:
        model.encode(images)
    with torch.no_grad(), shapes_of_layers(model) as decoding:
        model.decode(z)
    meta = spec.build_first_stage("meta")
    assert meta is not None
    encode = count_encoding(meta, images.to("meta"))
    decode = count_decoding(meta, z.to("meta"))
    assert encode.total_flops == pytest.approx(sum(encoding), rel=0.01)
    lookup = 3 * z.numel() * spec.row.num_embeddings if regularization == "vq" else 0  # type: ignore[operator]
    assert decode.flops["lookup"] == lookup
    assert decode.total_flops - lookup == pytest.approx(sum(decoding), rel=0.01)


def test_training_counts_the_backward_pass_by_torchs_counter() -> None:
    spec = narrow(8, "kl", image_size=64)
    unet, inputs = spec.build_unet("meta"), spec.unet_inputs(1, "meta")
    cost = count_training(unet, inputs, fused=True)
    with FlopCounterMode(display=False) as counter, ops.backend("reference"):
        F.mse_loss(unet(*inputs).sample, inputs[0]).backward()
    # Attention's fused backward computes the scores anew, torch's formula on meta does not.
    assert cost.total_flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    step = count_step(unet, inputs, fused=True)
    assert 2.9 * step.total_flops < cost.total_flops < 3.1 * step.total_flops
    weights = sum(weight.numel() for weight in unet.parameters())
    assert cost.bytes["update"] == 7 * 4 * weights


def test_convolution_bytes_are_those_of_its_operands() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, device="meta")
    x = torch.empty(2, 3, 8, 8, device="meta")
    with torch.no_grad():
        cost = count(lambda: conv(x), fused=True)
    y = 2 * 5 * 8 * 8
    assert dict(cost.bytes) == {"convolution": 4 * (x.numel() + 3 * 5 * 9 + 5 + y)}
    assert cost.peak_bytes == 4 * y
    assert cost.intensity == cost.total_flops / cost.total_bytes


def test_what_is_no_longer_held_does_not_count_towards_the_peak() -> None:
    x = torch.empty(1000, device="meta")

    def chain() -> None:
        y = x
        for _ in range(5):
            y = y + 1

    assert count(chain, fused=True).peak_bytes == 2 * 4 * 1000


@pytest.fixture(scope="module")
def costs() -> LDMCosts:
    return ldm_costs(narrow(4, "vq", image_size=32))


def test_fused_operators_move_less(costs: LDMCosts) -> None:
    assert costs.step.total_bytes < costs.step_eager.total_bytes
    assert costs.step.bytes["norm"] < 0.7 * costs.step_eager.bytes["norm"]
    assert costs.step.total_flops == costs.step_eager.total_flops


def test_sampling_and_training_are_sums_of_their_parts(costs: LDMCosts) -> None:
    sample = costs.sample(10)
    assert sample.total_flops == 10 * costs.step.total_flops + costs.decode.total_flops
    assert sample.total_bytes == 10 * costs.step.total_bytes + costs.decode.total_bytes
    trained = costs.train_from_image()
    assert trained.total_flops == costs.train.total_flops + costs.encode.total_flops
    for cost in (sample, trained):
        found = cost.as_dict()
        assert sum(found["flops_by_family"].values()) == found["flops"]
        assert sum(found["bytes_by_family"].values()) == found["bytes"]
        assert set(found["flops_by_family"]) == set(FAMILIES)


def test_sampling_flops_fall_from_f_1_to_8() -> None:
    for make in (LDMSpec, narrow):
        flops = []
        for f in (1, 2, 4, 8):
            spec = make(f, "none" if f == 1 else "kl")
            step = count_step(spec.build_unet("meta"), spec.unet_inputs(1, "meta"), fused=True)
            model = spec.build_first_stage("meta")
            z = spec.unet_inputs(1, "meta")[0]
            decode = count_decoding(model, z).total_flops if model is not None else 0
            flops.append(200 * step.total_flops + decode)
        assert flops == sorted(flops, reverse=True)


def test_memory_grows_with_the_batch(costs: LDMCosts) -> None:
    weights = 4 * costs.parameters
    for needed in (costs.sampling_memory, costs.training_memory):
        assert needed(2) - needed(1) == needed(3) - needed(2) > 0
    assert costs.training_memory(1) > 4 * weights
