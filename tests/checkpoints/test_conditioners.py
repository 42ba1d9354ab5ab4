"""Cond stages from CompVis's layout: the restated original's numbers, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from fastldm.checkpoints import compvis_state_dict
from fastldm.checkpoints.clip_encoder import load_clip
from fastldm.checkpoints.conditioner_keys import clip_prefix
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import ClassEmbedder, PatchDiscriminator, SpatialRescaler, TextEncoder
from tests.checkpoints.original import Weights, bert, rescale

BERT = {"n_embed": 24, "n_layer": 2, "vocab_size": 11, "max_seq_len": 7}
RESCALER = {"n_stages": 2, "in_channels": 5, "out_channels": 3}
CLIP = {
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 13,
    "max_position_embeddings": 9,
}


def yaml_of(target: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": f"ldm.modules.encoders.modules.{target}", "params": params}


@torch.no_grad()
@pytest.mark.parametrize("stated", [True, False])
def test_bert_gives_the_original_s_numbers(stated: bool) -> None:
    weights = Weights()
    tokens = torch.tensor([[3, 0, 10, 5, 5], [1, 2, 3, 4, 9]])
    expected = bert(weights, BERT, tokens)
    config = yaml_of("BERTEmbedder", BERT | {"use_tokenizer": False}) if stated else None
    model = TextEncoder.from_single_file(weights, config=config, torch_dtype=torch.float64)
    actual = model(tokens).last_hidden_state
    assert (actual - expected).abs().max() < 1e-12 * expected.abs().max()
    back = compvis_state_dict(model, prefix="")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_bert_without_its_head_on_the_vocabulary() -> None:
    weights = Weights()
    bert(weights, BERT, torch.zeros(1, 7, dtype=torch.int64))
    lean = {name: value for name, value in weights.items() if "to_logits" not in name}
    model = TextEncoder.from_single_file(lean, config=yaml_of("TransformerEmbedder", BERT))
    assert model.to_logits is None


@torch.no_grad()
def test_spatial_rescaler_gives_the_original_s_numbers() -> None:
    weights = Weights()
    condition = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    expected = rescale(weights, RESCALER, condition)
    for config in (yaml_of("SpatialRescaler", RESCALER), None):
        model = SpatialRescaler.from_single_file(weights, config=config, torch_dtype=torch.float64)
        torch.testing.assert_close(model(condition), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(
            compvis_state_dict(model)["cond_stage_model.channel_mapper.weight"],
            weights["channel_mapper.weight"],
        )


@pytest.mark.parametrize(("rows", "unconditional"), [(1000, None), (1001, 1000), (10, None)])
def test_class_embedder(rows: int, unconditional: int | None) -> None:
    table = torch.randn(rows, 6)
    config = yaml_of("ClassEmbedder", {"embed_dim": 6, "n_classes": rows, "key": "class_label"})
    for given in (config, None):
        model = ClassEmbedder.from_single_file({"embedding.weight": table}, config=given)
        assert model.unconditional_class == unconditional
        assert torch.equal(model(torch.tensor([7]))[0, 0], table[7])
    assert list(compvis_state_dict(model)) == ["cond_stage_model.embedding.weight"]


@pytest.fixture
def clip() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**CLIP, hidden_act="quick_gelu")).eval()


@torch.no_grad()
def test_clip_gives_what_transformers_gives(clip: CLIPTextModel) -> None:
    prefix = clip_prefix(clip)
    tensors = {
        f"transformer.text_model.{name.removeprefix(prefix)}": value
        for name, value in clip.state_dict().items()
    }
    tensors["transformer.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    model = load_clip(tensors, "last", "file", None)
    tokens = torch.tensor([[1, 2, 3, 12]])
    expected = clip(tokens).last_hidden_state
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)
    back = compvis_state_dict(model)
    stored = {f"cond_stage_model.{name}": value for name, value in tensors.items()}
    del stored["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def open_clip(model: CLIPTextModel) -> dict[str, Tensor]:
    """OpenCLIP's names, by its own conventions."""
    ours = {name.removeprefix(clip_prefix(model)): v for name, v in model.state_dict().items()}
    tensors = {
        "model.token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "model.positional_embedding": ours["embeddings.position_embedding.weight"],
        "model.text_projection": torch.randn(128, 128),
        "model.logit_scale": torch.tensor(1.0),
        "model.ln_final.weight": ours["final_layer_norm.weight"],
        "model.ln_final.bias": ours["final_layer_norm.bias"],
    }
    names = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(3):
        here, there = f"model.transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for leaf in ("weight", "bias"):
            for name, own in names.items():
                tensors[f"{here}.{name}.{leaf}"] = ours[f"{there}.{own}.{leaf}"]
            tensors[f"{here}.attn.in_proj_{leaf}"] = torch.cat(
                [ours[f"{there}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            )
    return tensors


@torch.no_grad()
def test_open_clip_s_penultimate_layer(clip: CLIPTextModel) -> None:
    clip = CLIPTextModel(CLIPTextConfig(**CLIP, hidden_act="gelu")).eval()
    tensors = open_clip(clip)
    tokens = torch.tensor([[1, 2, 3, 12]])
    whole = load_clip(tensors, "last", "file", None)
    torch.testing.assert_close(whole(tokens).last_hidden_state, clip(tokens).last_hidden_state)
    model = load_clip(tensors, "penultimate", "file", None)
    assert model.config.num_hidden_layers == 2
    hidden = clip(tokens, output_hidden_states=True).hidden_states[-2]
    expected = torch.nn.functional.layer_norm(
        hidden, (128,), tensors["model.ln_final.weight"], tensors["model.ln_final.bias"]
    )
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)


def test_clip_of_other_kinds_is_refused(clip: CLIPTextModel) -> None:
    tensors = open_clip(clip)
    with pytest.raises(ConfigError, match=r"layer: .*'hidden'"):
        load_clip(tensors, "hidden", "file", None)
    with pytest.raises(CheckpointError, match=r"file: .*missing model\.ln_final\.bias"):
        del tensors["model.ln_final.bias"]
        load_clip(tensors, "last", "file", None)
    with pytest.raises(CheckpointError, match="file: no CLIP text encoder"):
        load_clip({"model.token_embedding.weight": torch.zeros(3, 4)}, "last", "file", None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (yaml_of("FrozenT5Embedder", {"version": "t5"}), "no 'FrozenT5Embedder'; accepted: Class"),
        (yaml_of("BERTEmbedder", BERT | {"n_layer": 10**6}), "n_layer: expected at most 256"),
        (yaml_of("BERTEmbedder", BERT | {"embedding_dropout": 0.1}), "embedding_dropout: .*0.1"),
        (yaml_of("BERTEmbedder", {"n_layer": 2}), "n_embed: missing"),
        (yaml_of("BERTEmbedder", BERT | {"flavour": 1}), "does not know 'flavour'"),
    ],
)
def test_config_errors_name_the_argument(config: dict[str, Any], message: str) -> None:
    weights = Weights()
    bert(weights, BERT, torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ConfigError, match=message):
        TextEncoder.from_single_file(weights, config=config)


def test_another_cond_stage_is_refused() -> None:
    table = {"embedding.weight": torch.zeros(10, 4)}
    with pytest.raises(CheckpointError, match="those of ClassEmbedder, not TextEncoder"):
        TextEncoder.from_single_file(table)
    with pytest.raises(CheckpointError, match=r"fastldm has no cond stage with tower\.weight"):
        TextEncoder.from_single_file({"cond_stage_model.tower.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="PatchDiscriminator: CompVis's single files hold no"):
        PatchDiscriminator.from_single_file(table)
    with pytest.raises(ConfigError, match="no place for a Linear"):
        compvis_state_dict(torch.nn.Linear(2, 2))
