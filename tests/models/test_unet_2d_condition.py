"""UNet2DConditionModel: sizes of the paper's models, fields beyond diffusers', inputs, errors."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastldm.errors import ConfigError, DataError
from fastldm.models import UNet2DConditionModel

TINY: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
ALL_CROSS = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
}

ONE_LEVEL = {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}


def tiny(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TINY, **changes}).eval()


def inputs(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 800]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        **changes,
    }


def levels(width: int, multipliers: list[int], attended: list[int]) -> dict[str, Any]:
    """The fields of a UNet with cross-attention at the levels numbered in `attended`."""
    kinds = ["CrossAttn" if level in attended else "" for level in range(len(multipliers))]
    return {
        "block_out_channels": [width * factor for factor in multipliers],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "cross_attention_dim": 512,
        "num_attention_heads": 1,
    }


# Table 13 of the paper, in millions as counted, and the models of CompVis, exactly.
TABLE_13 = {
    "LDM-1": (3, levels(192, [1, 1, 2, 2, 4, 4], [3, 4, 5]), 396.8),
    "LDM-2": (2, levels(192, [1, 2, 2, 4, 4], [2, 3, 4]), 390.9),
    "LDM-4": (3, levels(192, [1, 2, 3, 5], [1, 2, 3]), 400.9),
    "LDM-8": (4, levels(256, [1, 2, 4], [0, 1, 2]), 395.0),
    "LDM-16": (8, levels(256, [1, 2, 4], [0, 1, 2]), 395.0),
    "LDM-32": (32, levels(256, [1, 2, 4], [0, 1, 2]), 395.1),
}
COMPVIS = {
    "cin256": (4, levels(256, [1, 2, 4], [0, 1, 2]), 394_984_196),
    "cin256-v2": (3, levels(192, [1, 2, 3, 5], [1, 2, 3]), 400_920_579),
    "text2img256": (
        3,
        {**levels(192, [1, 2, 3, 5], [1, 2, 3]), "cross_attention_dim": 640},
        403_623_939,
    ),
    "txt2img-1p4B": (
        4,
        {**levels(320, [1, 2, 4, 4], [0, 1, 2]), "cross_attention_dim": 1280},
        872_300_484,
    ),
    "layout2img": (
        3,
        {**levels(128, [1, 2, 3, 4], [1, 2, 3]), "transformer_layers_per_block": 3},
        246_277_379,
    ),
    "rdm768": (
        16,
        {**levels(448, [1, 2, 3, 4], [0, 1, 2]), "cross_attention_dim": 768},
        1_335_480_400,
    ),
}


def count(channels: int, config: dict[str, Any]) -> int:
    config = {**config, "in_channels": channels, "out_channels": channels}
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).num_parameters()


@pytest.mark.parametrize("name", TABLE_13)
def test_sizes_of_table_13(name: str) -> None:
    channels, config, millions = TABLE_13[name]
    assert round(count(channels, config) / 1e6, 1) == millions


@pytest.mark.parametrize("name", COMPVIS)
def test_sizes_of_compvis_models(name: str) -> None:
    channels, config, parameters = COMPVIS[name]
    assert count(channels, config) == parameters


def test_channels_a_head_are_recorded_as_heads_that_diffusers_understands(tmp_path: Any) -> None:
    model = tiny(num_head_channels=4, mid_block_type="UNetMidBlock2DCrossAttn")
    assert model.config.attention_head_dim == [2, 4]
    assert model.config.num_head_channels is None
    model.save_pretrained(tmp_path)
    expected = model(**inputs()).sample
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(**inputs()).sample, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path)(**inputs()).sample, expected)


def test_channels_a_head_of_plain_attention_stay_in_the_config() -> None:
    plain = {
        "down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "AttnUpBlock2D"],
    }
    model = tiny(num_head_channels=4, **plain)
    assert model.config.num_head_channels == 4
    assert [level.attentions[0].heads for level in (model.down_blocks[0], model.up_blocks[1])] == [
        2,
        2,
    ]
    again = UNet2DConditionModel.from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**inputs()).sample, model(**inputs()).sample)


def test_number_of_heads_replaces_the_misnamed_field() -> None:
    expected = tiny(attention_head_dim=[2, 4])(**inputs()).sample
    actual = tiny(attention_head_dim=1, num_attention_heads=[2, 4])(**inputs()).sample
    assert torch.equal(actual, expected)
    other = tiny(attention_head_dim=1)(**inputs()).sample
    assert not torch.allclose(other, expected, rtol=1e-3)


def test_residual_blocks_resample_beside_cross_attention() -> None:
    model = tiny(**ALL_CROSS, downsample_type="resnet", upsample_type="resnet")
    assert "down_blocks.0.downsamplers.0.conv2.weight" in model.state_dict()
    assert "up_blocks.0.upsamplers.0.conv2.weight" in model.state_dict()
    assert model(**inputs()).sample.shape == (2, 4, 8, 8)
    with pytest.raises(DataError, match=r"sample: .*multiples of 2, got 8×7"):
        model(**inputs(sample=torch.zeros(2, 4, 8, 7)))


def test_contexts_of_several_widths_are_checked_against_those_in_use() -> None:
    model = tiny(cross_attention_dim=[12, 9], mid_block_type=None)
    assert model(**inputs()).sample.shape == (2, 4, 8, 8)
    with pytest.raises(DataError, match=r"encoder_hidden_states: expected \[2, length, 12\]"):
        model(**inputs(encoder_hidden_states=torch.zeros(2, 5, 9)))


def test_masked_tokens_have_no_influence() -> None:
    model, arguments = tiny(), inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    actual = model(**arguments, encoder_attention_mask=mask).sample
    shorter = {name: value[:1] for name, value in arguments.items()}
    shorter["encoder_hidden_states"] = shorter["encoder_hidden_states"][:, :3]
    torch.testing.assert_close(actual[:1], model(**shorter).sample, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(**arguments, encoder_attention_mask=mask.bool()).sample, actual)
    assert not torch.allclose(model(**arguments).sample[0], actual[0], rtol=1e-3)


def test_masked_pixels_have_no_influence_through_self_attention() -> None:
    model = tiny(**ONE_LEVEL)
    theirs = diffusers.UNet2DConditionModel.from_config(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    mask = (torch.arange(64) < 40).expand(2, 64)
    expected = theirs(**inputs(attention_mask=mask)).sample
    torch.testing.assert_close(
        model(**inputs(attention_mask=mask)).sample, expected, rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(model(**inputs()).sample, expected, rtol=1e-3)


def test_residuals_of_the_caller_are_left_alone() -> None:
    model = tiny()
    residuals = [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)]
    residuals[0] = torch.randn(2, 8, 8, 8)
    before = [residual.clone() for residual in residuals]
    model(**inputs(down_intrablock_additional_residuals=residuals))
    assert all(map(torch.equal, residuals, before))


def test_float32_is_within_rounding_of_float64() -> None:
    model, arguments = tiny(), inputs()
    actual = model(**arguments).sample
    wide = {name: v.double() if v.is_floating_point() else v for name, v in arguments.items()}
    expected = model.double()(**wide).sample
    assert expected.dtype == torch.float64
    assert (actual - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_output_as_tuple() -> None:
    model = tiny()
    (output,) = model(**inputs(), return_dict=False)
    assert torch.equal(output, model(**inputs()).sample)


def test_bfloat16_autocast() -> None:
    model = tiny(**TEXT_TIME)
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.full((2, 6), 512.0)}
    expected = model(**inputs(), added_cond_kwargs=added).sample
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(**inputs(), added_cond_kwargs=added).sample
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


def gradients(model: UNet2DConditionModel, upstream: Tensor) -> list[Tensor]:
    output = model(**inputs()).sample
    return list(torch.autograd.grad(output, list(model.parameters()), upstream))


def saved_elements(model: UNet2DConditionModel) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs())
    return total


def test_gradient_checkpointing_keeps_less_and_changes_nothing() -> None:
    model, upstream = tiny(transformer_layers_per_block=2).train(), torch.randn(2, 4, 8, 8)
    expected, kept = gradients(model, upstream), saved_elements(model)
    model.enable_gradient_checkpointing()
    assert saved_elements(model) < kept / 2
    for actual, wanted in zip(gradients(model, upstream), expected, strict=True):
        assert torch.equal(actual, wanted)
    model.disable_gradient_checkpointing()
    assert saved_elements(model) == kept


def test_compiles_into_one_graph_for_every_size() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny(**ONE_LEVEL)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch, side, length in ((2, 8, 5), (3, 12, 7), (4, 16, 9)):
        sample, timestep = torch.randn(batch, 4, side, side), torch.arange(batch)
        context, mask = torch.randn(batch, length, 12), torch.rand(batch, length) < 0.9
        mask[:, 0] = True
        for tensor, dims in (
            (sample, (0, 2, 3)),
            (timestep, (0,)),
            (context, (0, 1)),
            (mask, (0, 1)),
        ):
            torch._dynamo.maybe_mark_dynamic(tensor, dims)
        arguments = (sample, timestep, context)
        with torch.no_grad():
            actual = compiled(*arguments, encoder_attention_mask=mask).sample
            expected = model(*arguments, encoder_attention_mask=mask).sample
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_compiled_gradients() -> None:
    torch._dynamo.reset()
    model, upstream = tiny(**ONE_LEVEL, mid_block_type=None).train(), torch.randn(2, 4, 8, 8)
    expected = gradients(model, upstream)
    model.enable_gradient_checkpointing()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**inputs()).sample
    actual = torch.autograd.grad(output, list(model.parameters()), upstream)
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
        ({"resnet_out_scale_factor": 1.4}, "resnet_out_scale_factor"),
        ({"attention_type": "gated"}, "attention_type: .*'gated'"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 4}, "encoder_hid_dim_type"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim: needed"),
        ({"encoder_hid_dim": 4, "cross_attention_dim": [12, 9]}, "cross_attention_dim: needed"),
        ({"addition_embed_type": "image"}, "addition_embed_type: .*'image'"),
        ({**TEXT_TIME, "addition_time_embed_dim": None}, "addition_time_embed_dim: needed"),
        (
            {**TEXT_TIME, "projection_class_embeddings_input_dim": None},
            "projection_class_embeddings_input_dim: needed by addition_embed_type",
        ),
        (
            {"class_embed_type": "projection"},
            "projection_class_embeddings_input_dim: needed by class_embed_type",
        ),
        ({"class_embed_type": "rotary"}, "class_embed_type: .*'rotary'"),
        ({"addition_embed_type": "text"}, "addition_embed_type_num_heads: 64 heads"),
        ({"time_embedding_type": "learned"}, "time_embedding_type: .*'learned'"),
        ({"time_embedding_type": "fourier", "time_embedding_dim": 7}, "time_embedding_dim"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2}, "down_block_types"),
        ({"up_block_types": ["KUpBlock2D"] * 2}, "up_block_types: .*'KUpBlock2D'"),
        ({"attention_head_dim": [2, 2, 2]}, "attention_head_dim: expected 2 entries"),
        ({"num_attention_heads": [2]}, "num_attention_heads: expected 2 entries"),
        ({"cross_attention_dim": [12]}, "cross_attention_dim: expected 2 entries"),
        ({"only_cross_attention": [True]}, "only_cross_attention: expected 2 entries"),
        ({"layers_per_block": [1, 1, 1]}, "layers_per_block: expected 2 entries"),
        ({"transformer_layers_per_block": [1]}, "transformer_layers_per_block: expected 2"),
        ({"transformer_layers_per_block": [[1], 1]}, "reverse_transformer_layers_per_block"),
        (
            {
                "transformer_layers_per_block": [[1, 1], 1],
                "reverse_transformer_layers_per_block": [1, [1, 1]],
            },
            r"transformer_layers_per_block: expected 1 entries for a level, got \[1, 1\]",
        ),
        (
            {"reverse_transformer_layers_per_block": [1, [1]]},
            "reverse_transformer_layers_per_block: expected 2 entries for a level",
        ),
        ({"reverse_transformer_layers_per_block": [1]}, "reverse_transformer_layers_per_block"),
        ({"num_head_channels": 3}, "num_head_channels: 16 channels"),
        ({"num_head_channels": 4, "num_attention_heads": 2}, "give one of them"),
        ({"attention_head_dim": 9}, "attention_head_dim: 9 heads"),
        ({"downsample_type": "max"}, "downsample_type: .*'max'"),
        ({"norm_num_groups": None}, "norm_num_groups: .*None"),
        ({"cross_attention": 12}, "no config field 'cross_attention'"),
    ],
)
def test_config_errors_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet2DConditionModel.from_config({**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"sample": torch.zeros(2, 3, 8, 8)}, r"sample: expected \[B, 4, H, W\]"),
        ({}, {"timestep": torch.zeros(3)}, "timestep"),
        (
            {},
            {"encoder_hidden_states": torch.zeros(2, 5, 13)},
            r"encoder_hidden_states: expected \[2, length, 12\], got \[2, 5, 13\]",
        ),
        ({}, {"encoder_hidden_states": torch.zeros(3, 5, 12)}, r"got \[3, 5, 12\]"),
        ({}, {"encoder_hidden_states": torch.zeros(2, 12)}, r"got \[2, 12\]"),
        ({"encoder_hid_dim": 7}, {}, r"expected \[2, length, 7\], got \[2, 5, 12\]"),
        (
            {},
            {"encoder_attention_mask": torch.ones(2, 6)},
            r"encoder_attention_mask: expected \[2, 5\], got \[2, 6\]",
        ),
        ({}, {"class_labels": torch.tensor([0, 1])}, "class_labels: .*no classes"),
        ({"num_class_embeds": 4}, {}, "class_labels: .*needs"),
        ({}, {"timestep_cond": torch.zeros(2, 4)}, "timestep_cond"),
        ({}, {"cross_attention_kwargs": {"gligen": {}}}, "cross_attention_kwargs: .*'gligen'"),
        (TEXT_TIME, {}, r"added_cond_kwargs: .*\['text_embeds', 'time_ids'\]"),
        (
            TEXT_TIME,
            {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 10)}},
            r"added_cond_kwargs: .*needs \['time_ids'\]",
        ),
        (
            TEXT_TIME,
            {
                "added_cond_kwargs": {
                    "text_embeds": torch.zeros(2, 10),
                    "time_ids": torch.zeros(2, 5),
                }
            },
            "added_cond_kwargs: .*30 features, expected 34",
        ),
        (
            {},
            {"down_block_additional_residuals": [torch.zeros(2, 8, 8, 8)]},
            "mid_block_additional_residual",
        ),
        (
            {},
            {
                "down_block_additional_residuals": [torch.zeros(2, 8, 8, 8)],
                "mid_block_additional_residual": torch.zeros(2, 16, 4, 4),
            },
            "down_block_additional_residuals: expected 4, got 1",
        ),
    ],
)
def test_input_errors_name_the_argument(
    changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    model = tiny(**changes)
    with pytest.raises((DataError, ConfigError), match=message):
        model(**inputs(**arguments))
