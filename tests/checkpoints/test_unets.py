"""UNets from CompVis's layout: the restated original's numbers, and every bit on the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastldm.checkpoints import compvis_state_dict
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import UNet2DConditionModel, UNet2DModel
from tests.checkpoints.original import Weights, unet

PLAIN: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 2,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
}
CROSS: dict[str, Any] = {**PLAIN, "use_spatial_transformer": True, "context_dim": 12}
MODELS: dict[str, dict[str, Any]] = {
    "heads": PLAIN,
    "channels a head": {**PLAIN, "num_heads": -1, "num_head_channels": 16},
    "new attention order": {**PLAIN, "use_new_attention_order": True},
    "attention at each level": {**PLAIN, "attention_resolutions": [1, 2], "num_res_blocks": 2},
    "attention in the middle only": {**PLAIN, "attention_resolutions": [32]},
    "residual resampling, scale-shift": {
        **PLAIN,
        "resblock_updown": True,
        "use_scale_shift_norm": True,
        "channel_mult": [1, 2, 2],
    },
    "no convolution in resampling": {**PLAIN, "conv_resample": False, "channel_mult": [1, 2, 2]},
    "classes": {**PLAIN, "num_classes": 5},
    "one level": {**PLAIN, "channel_mult": [1], "attention_resolutions": [1]},
    "cross-attention": CROSS,
    "cross-attention, two deep": {
        **CROSS,
        "transformer_depth": 2,
        "num_heads": -1,
        "num_head_channels": 32,
        "attention_resolutions": [1, 2],
    },
    "cross-attention, residual resampling": {
        **CROSS,
        "resblock_updown": True,
        "use_scale_shift_norm": True,
        "num_classes": 5,
    },
    "cross-attention, depths": {
        **CROSS,
        "transformer_depth": [1, 2],
        "attention_resolutions": [1, 2],
        "use_linear_in_transformer": True,
        "disable_self_attentions": [True, False],
        "num_classes": "sequential",
        "adm_in_channels": 6,
        "legacy": False,
    },
    "cross-attention, no convolution in resampling": {**CROSS, "conv_resample": False},
}


def kind_of(params: dict[str, Any]) -> type[UNet2DModel | UNet2DConditionModel]:
    return UNet2DConditionModel if "use_spatial_transformer" in params else UNet2DModel


def yaml_of(params: dict[str, Any]) -> dict[str, Any]:
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def inputs(params: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values: dict[str, Any] = {"x": normal(2, 3, 8, 8), "t": torch.tensor([3, 998])}
    if "context_dim" in params:
        values["context"] = normal(2, 5, params["context_dim"])
    if isinstance(params.get("num_classes"), int):
        values["y"] = torch.tensor([4, 1])
    elif "num_classes" in params:
        values["y"] = normal(2, params["adm_in_channels"])
    return values


def ours(model: UNet2DModel | UNet2DConditionModel, given: dict[str, Any]) -> torch.Tensor:
    arguments = {}
    if "context" in given:
        arguments["encoder_hidden_states"] = given["context"]
    if "y" in given:
        arguments["class_labels"] = given["y"]
    return model(given["x"], given["t"], **arguments).sample


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_numbers_are_the_original_s_and_every_bit_comes_back(name: str) -> None:
    params, given, weights = MODELS[name], inputs(MODELS[name]), Weights()
    expected = unet(weights, params, **given)
    model = kind_of(params).from_single_file(
        weights, config=yaml_of(params), torch_dtype=torch.float64
    )
    error = (ours(model, given) - expected).abs().max() / expected.abs().max()
    assert error < 1e-12
    new_order = params.get("use_new_attention_order", False)
    back = compvis_state_dict(model, prefix="", new_attention_order=new_order)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_tell_all_but_the_heads(name: str) -> None:
    params, weights = MODELS[name], Weights()
    with torch.no_grad():
        unet(weights, params, **inputs(params))
    kind = kind_of(params)
    stated = kind.from_single_file(weights, config=yaml_of(params))
    with pytest.raises(ConfigError, match=r"number of attention heads.*config="):
        kind.from_single_file(weights)
    names = ("num_attention_heads", "attention_head_dim")
    heads = {field: stated.config[field] for field in names}
    inferred = kind.from_single_file(weights, **heads)
    assert {**inferred.config, "sample_size": 8} == stated.config


def test_the_order_inside_packed_projections_matters() -> None:
    weights = Weights()
    given = inputs(PLAIN)
    with torch.no_grad():
        expected = unet(weights, PLAIN, **given)
        new = {**PLAIN, "use_new_attention_order": True}
        model = UNet2DModel.from_single_file(
            weights, config=yaml_of(new), torch_dtype=torch.float64
        )
        assert (ours(model, given) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 3}, "dims: fastldm has no such UNet, got 3"),
        ({"n_embed": 16}, "n_embed: fastldm has no such UNet, got 16"),
        ({"num_heads_upsample": 2}, "num_heads_upsample: .* got 2"),
        ({"channel_mult": [1, 0]}, "channel_mult: fastldm has no such UNet"),
        ({"channel_mult": [2, 2]}, "channel_mult: fastldm has no such UNet"),
        ({"channel_mult": []}, "channel_mult: fastldm has no such UNet"),
        ({"channel_mult": [1, "2"]}, r"channel_mult: expected a list of an integer, got a list"),
        ({"num_res_blocks": [1]}, "num_res_blocks: expected 2 numbers"),
        ({"num_classes": "sequential"}, "num_classes: 'sequential' is supported with"),
        ({"roundness": 1}, "does not know 'roundness'"),
        ({"model_channels": None}, "model_channels: expected an integer, got None"),
        ({"model_channels": 2**40}, "model_channels: expected an integer, got 1099511627776"),
        ({"dropout": "lots"}, "dropout: expected a number, got 'lots'"),
        ({"num_heads": 3}, "num_attention_heads: 3 heads do not divide 64"),
    ],
)
def test_config_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    weights = Weights()
    with torch.no_grad():
        unet(weights, PLAIN, **inputs(PLAIN))
    with pytest.raises(ConfigError, match=message):
        UNet2DModel.from_single_file(weights, config=yaml_of({**PLAIN, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_res_blocks": 2}, "missing .*skip_connection"),
        ({"num_res_blocks": 10**9}, "the config is of a UNet with at least"),
        ({"channel_mult": [1] * 10_000}, "the config is of a UNet with at least"),
        ({"num_classes": 7}, "missing label_emb.weight"),
        ({"in_channels": 4}, r"\[32, 3, 3, 3\] in the file, \[32, 4, 3, 3\] in the model"),
        ({"use_spatial_transformer": True, "context_dim": 8}, "those of UNet2DConditionModel"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    weights = Weights()
    with torch.no_grad():
        unet(weights, PLAIN, **inputs(PLAIN))
    with pytest.raises(CheckpointError, match=message):
        UNet2DModel.from_single_file(weights, config=yaml_of({**PLAIN, **changes}))
