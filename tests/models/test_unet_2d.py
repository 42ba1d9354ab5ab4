"""UNet2DModel: sizes of the paper's models, fields beyond diffusers', inputs, errors."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastldm.errors import ConfigError, DataError
from fastldm.models import UNet2DModel

TINY: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def tiny(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**TINY, **changes}).eval()


def levels(width: int, multipliers: list[int], attended: list[int]) -> dict[str, Any]:
    """The fields of a UNet with attention at the levels numbered in `attended`."""
    kinds = ["Attn" if level in attended else "" for level in range(len(multipliers))]
    return {
        "block_out_channels": [width * factor for factor in multipliers],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "attention_head_dim": 32,
    }


def resnet_resampling(config: dict[str, Any]) -> dict[str, Any]:
    """The same, resampled by residual blocks at every level."""
    rename = {"DownBlock2D": "ResnetDownsampleBlock2D", "UpBlock2D": "ResnetUpsampleBlock2D"}
    return {
        **config,
        "down_block_types": [rename.get(name, name) for name in config["down_block_types"]],
        "up_block_types": [rename.get(name, name) for name in config["up_block_types"]],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    }


# Table 14 of the paper, in millions, and the models of CompVis, exactly.
TABLE_14 = {
    "LDM-1": (3, levels(192, [1, 1, 2, 2, 4, 4], [3, 4, 5]), 270.5),
    "LDM-2": (2, levels(192, [1, 2, 2, 4, 4], [2, 3, 4]), 264.5),
    "LDM-4": (3, levels(224, [1, 2, 3, 4], [1, 2, 3]), 274.1),
    "LDM-8": (4, levels(256, [1, 2, 4], [0, 1, 2]), 257.7),
    "LDM-16": (8, levels(256, [1, 2, 4], [0, 1, 2]), 257.8),
    "LDM-32": (32, levels(256, [1, 2, 4], [0, 1, 2]), 257.9),
}
COMPVIS = {
    "celebahq": (3, 3, levels(224, [1, 2, 3, 4], [1, 2, 3]), 274_056_163),
    "churches": (
        4,
        4,
        {
            **resnet_resampling(levels(192, [1, 2, 2, 4, 4], [0, 1, 2, 3])),
            "num_attention_heads": 8,
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32,
        },
        294_966_916,
    ),
    "bsr_sr": (6, 3, levels(160, [1, 2, 2, 4], [3]), 113_622_563),
    "inpainting_big": (
        7,
        3,
        {**resnet_resampling(levels(256, [1, 2, 3, 4], [1, 2, 3])), "num_attention_heads": 8},
        387_245_827,
    ),
    "semantic_synthesis": (
        6,
        3,
        {**levels(128, [1, 4, 8], []), "num_attention_heads": 8},
        215_229_315,
    ),
}


def count(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return UNet2DModel.from_config(config).num_parameters()


@pytest.mark.parametrize("name", TABLE_14)
def test_sizes_of_table_14(name: str) -> None:
    channels, config, millions = TABLE_14[name]
    parameters = count({**config, "in_channels": channels, "out_channels": channels})
    assert round(parameters / 1e6, 1) == millions


@pytest.mark.parametrize("name", COMPVIS)
def test_sizes_of_compvis_models(name: str) -> None:
    in_channels, out_channels, config, parameters = COMPVIS[name]
    assert count({**config, "in_channels": in_channels, "out_channels": out_channels}) == parameters


def test_number_of_heads_and_channels_a_head_say_the_same() -> None:
    widths = {"block_out_channels": [16, 16]}
    by_channels = tiny(**widths, attention_head_dim=4)
    by_number = tiny(**widths, attention_head_dim=99, num_attention_heads=4)
    one_head = tiny(**widths, attention_head_dim=None)
    sample = torch.randn(2, 3, 8, 8)
    expected = by_channels(sample, 3).sample
    assert torch.equal(by_number(sample, 3).sample, expected)
    assert not torch.allclose(one_head(sample, 3).sample, expected, rtol=1e-3)


def test_float32_is_within_rounding_of_float64() -> None:
    model = tiny(resnet_time_scale_shift="scale_shift")
    sample = torch.randn(2, 3, 8, 8)
    actual = model(sample, 500).sample
    expected = model.double()(sample.double(), 500).sample
    assert expected.dtype == torch.float64
    assert (actual - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "timestep",
    [17, 17.0, torch.tensor(17), torch.tensor([17]), torch.tensor([17.0, 17.0])],
    ids=repr,
)
def test_every_form_of_a_timestep(timestep: Tensor | float | int) -> None:
    model, sample = tiny(), torch.randn(2, 3, 8, 8)
    assert torch.equal(model(sample, timestep).sample, model(sample, torch.tensor([17, 17])).sample)


def test_output_as_tuple() -> None:
    model, sample = tiny(), torch.randn(1, 3, 8, 8)
    (output,) = model(sample, 1, return_dict=False)
    assert torch.equal(output, model(sample, 1).sample)


def test_sizes_that_do_not_halve_evenly() -> None:
    # diffusers' UNet2DModel fails on them, but its other UNet, with these levels, does not.
    plain = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    fields = {"block_out_channels": [8, 16, 16], "norm_num_groups": 4, "mid_block_type": None}
    theirs = diffusers.UNet2DConditionModel(**plain, **fields).eval()
    ours = UNet2DModel(**plain, **fields, in_channels=4, out_channels=4)
    ours.load_state_dict(theirs.state_dict())
    sample = torch.randn(1, 4, 11, 6)
    expected = theirs(sample, 5, torch.randn(1, 1, 1280)).sample
    torch.testing.assert_close(ours(sample, 5).sample, expected, rtol=1e-5, atol=1e-6)


def test_resampling_without_convolutions_has_no_weights() -> None:
    model = tiny(resample_with_conv=False)
    changed = {name for name in tiny().state_dict() if name not in model.state_dict()}
    assert changed == {
        f"{block}.0.{sampler}.0.conv.{leaf}"
        for block, sampler in (("down_blocks", "downsamplers"), ("up_blocks", "upsamplers"))
        for leaf in ("weight", "bias")
    }
    x = torch.randn(1, 8, 8, 8)
    averages = x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(model.down_blocks[0].downsamplers[0](x), averages)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(model.up_blocks[0].upsamplers[0](x), repeated)
    assert model(torch.randn(2, 3, 8, 6), 3).sample.shape == (2, 3, 8, 6)


def test_channels_last() -> None:
    model, sample = tiny(), torch.randn(2, 3, 8, 8)
    expected = model(sample, 5).sample
    model.to(memory_format=torch.channels_last)
    actual = model(sample.to(memory_format=torch.channels_last), 5).sample
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast() -> None:
    model, sample = tiny(num_class_embeds=3), torch.randn(2, 3, 8, 8)
    labels = torch.tensor([0, 2])
    expected = model(sample, 5, labels).sample
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(sample, 5, labels).sample
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


def gradients(model: UNet2DModel, sample: Tensor, upstream: Tensor) -> list[Tensor]:
    output = model(sample, torch.tensor([1, 800])).sample
    return list(torch.autograd.grad(output, list(model.parameters()), upstream))


def saved_elements(model: UNet2DModel, sample: Tensor) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(sample, 1)
    return total


@pytest.mark.parametrize("resampling", ["conv", "resnet"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(resampling: str) -> None:
    model = tiny(downsample_type=resampling, upsample_type=resampling).train()
    sample, upstream = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    expected, kept = gradients(model, sample, upstream), saved_elements(model, sample)
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert saved_elements(model, sample) < kept / 2
    for actual, wanted in zip(gradients(model, sample, upstream), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_compiles_into_one_graph_for_every_size() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny(mid_block_type=None)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch, side in ((2, 8), (3, 12), (5, 16)):
        sample, timestep = torch.randn(batch, 3, side, side), torch.arange(batch)
        for tensor, dims in ((sample, (0, 2, 3)), (timestep, (0,))):
            torch._dynamo.maybe_mark_dynamic(tensor, dims)
        with torch.no_grad():
            actual, expected = compiled(sample, timestep).sample, model(sample, timestep).sample
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types: expected 2 entries"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types: expected 2 entries"),
        ({"block_out_channels": []}, "block_out_channels: .*at least one"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "down_block_types: .*'SkipDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D", None]}, "up_block_types: .*None"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "UNet2DConditionModel"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"time_embedding_type": "rotary"}, "time_embedding_type: .*'rotary'"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"class_embed_type": "projection"}, "class_embed_type: .*'projection'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift: .*'spatial'"),
        ({"downsample_type": "max"}, "downsample_type: .*'max'"),
        ({"upsample_type": None}, "upsample_type: .*None"),
        ({"norm_num_groups": None}, "norm_num_groups: .*None"),
        ({"norm_num_groups": 5}, "norm_num_groups: .* 5 groups"),
        ({"attention_head_dim": 5}, "attention_head_dim: 16 channels .* 5"),
        ({"num_attention_heads": 3}, "num_attention_heads: 3 heads .* 16 channels"),
        ({"act_fn": "tanh"}, "act_fn: .*'tanh'"),
        ({"depth": 2}, "no config field 'depth'"),
    ],
)
def test_config_errors_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet2DModel.from_config({**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({}, {"sample": torch.zeros(2, 4, 8, 8)}, r"sample: expected \[B, 3, H, W\].*2, 4, 8, 8"),
        ({}, {"sample": torch.zeros(3, 8, 8)}, r"sample: expected \[B, 3, H, W\]"),
        ({}, {"timestep": torch.zeros(3)}, r"timestep: .*\[2\], got \[3\]"),
        ({}, {"class_labels": torch.tensor([0, 1])}, "class_labels: .*no classes"),
        ({"num_class_embeds": 4}, {}, r"class_labels: .*needs \[2\]"),
        ({"num_class_embeds": 4}, {"class_labels": torch.tensor([1])}, "class_labels: expected 2"),
        ({"num_class_embeds": 4}, {"class_labels": torch.zeros(2)}, "class_labels: .*integers"),
        (
            {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "upsample_type": "resnet"},
            {"sample": torch.zeros(2, 3, 8, 7)},
            "sample: .*multiples of 2, got 8×7",
        ),
    ],
)
def test_input_errors_name_the_argument(
    changes: dict[str, Any], inputs: dict[str, Any], message: str
) -> None:
    arguments = {"sample": torch.zeros(2, 3, 8, 8), "timestep": 1, **inputs}
    with pytest.raises(DataError, match=message):
        tiny(**changes)(**arguments)


def test_settings_of_an_averaged_model_in_the_config_are_dropped() -> None:
    model = UNet2DModel.from_config({**TINY, "decay": 0.999, "optimization_step": 7})
    assert "decay" not in model.config


def test_old_names_of_block_types() -> None:
    old = {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]}
    assert tiny(**old).state_dict().keys() == tiny().state_dict().keys()
