"""Every kind of condition, with and without being dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastldm import ClassEmbedder, LatentDiffusion
from fastldm.errors import ConfigError, DataError

KINDS = ["none", "crossattn", "classes", "concat", "hybrid", "class"]
DROP = torch.tensor([True, False, True])


def fields(conditioning: Any) -> list[torch.Tensor]:
    return [value for value in vars(conditioning).values() if value is not None]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_dropping_changes_the_dropped_samples_alone(build, kind: str) -> None:
    model = build.model(kind).eval()
    cond = build.condition(kind)
    kept, dropped = model.encode_condition(cond, 3), model.encode_condition(cond, 3, DROP)
    everyone = model.encode_condition(cond, 3, torch.ones(3, dtype=torch.bool))
    changed = 0
    for whole, part, without in zip(*map(fields, (kept, dropped, everyone)), strict=True):
        torch.testing.assert_close(part[1], whole[1])
        torch.testing.assert_close(part[DROP], without[DROP])
        changed += not torch.equal(part[DROP], whole[DROP])
    assert changed == 1


def test_what_stands_for_no_condition(build) -> None:
    everyone = torch.ones(3, dtype=torch.bool)

    def without(kind: str) -> Any:
        model = build.model(kind).eval()
        return model, model.encode_condition(build.condition(kind), 3, everyone)

    model, text = without("crossattn")
    expected = model.conditioner(model.tokenizer(["", "", ""]).input_ids).last_hidden_state
    torch.testing.assert_close(text.hidden_states, expected)
    model, classes = without("classes")
    torch.testing.assert_close(
        classes.hidden_states, model.conditioner.embedding.weight[3].expand(3, 1, 12)
    )
    assert without("class")[1].class_labels.tolist() == [3, 3, 3]
    assert not without("concat")[1].concat.any()
    model, hybrid = without("hybrid")
    assert torch.equal(hybrid.concat, build.condition("hybrid")["concat"])
    expected = model.conditioner(model.tokenizer(["", "", ""]).input_ids).last_hidden_state
    torch.testing.assert_close(hybrid.hidden_states, expected)


def test_captions_ids_and_contexts_are_the_same_condition(build) -> None:
    model = build.model("crossattn").eval()
    captions = build.condition("crossattn")
    ids = model.tokenizer(captions).input_ids
    for drop in (None, DROP):
        expected = model.encode_condition(captions, 3, drop).hidden_states
        from_ids = model.encode_condition(ids, 3, drop).hidden_states
        context = model.conditioner(ids).last_hidden_state
        from_context = model.encode_condition(context, 3, drop).hidden_states
        torch.testing.assert_close(from_ids, expected)
        torch.testing.assert_close(from_context, expected)


def test_a_model_without_conditioner_takes_contexts(build) -> None:
    model = LatentDiffusion(
        build.first_stage(), build.cross_unet(), build.scheduler(), conditioning="crossattn"
    )
    context = torch.randn(3, 5, 12)
    assert torch.equal(model.encode_condition(context, 3).hidden_states, context)
    dropped = model.encode_condition(context, 3, DROP).hidden_states
    assert not dropped[DROP].any()
    assert torch.equal(dropped[1], context[1])
    with pytest.raises(DataError, match="has no conditioner"):
        model.encode_condition(["a"], 1)


def test_tokens_without_a_tokenizer(build) -> None:
    """As in layout-to-image, where the tokens stand for boxes."""
    model = build.model("crossattn", tokenizer=None).eval()
    ids = torch.randint(1, 100, (3, 8))
    dropped = model.encode_condition(ids, 3, DROP).hidden_states
    ids[DROP] = 0
    torch.testing.assert_close(dropped, model.encode_condition(ids, 3).hidden_states)
    with pytest.raises(ConfigError, match="tokenizer: captions were given"):
        model.encode_condition(["a", "b", "c"], 3)


def test_the_mask_reaches_encoder_and_unet(build) -> None:
    masking = {"conditioner": build.text_encoder(use_attention_mask=True)}
    model = build.model("crossattn", **masking).eval()
    assert model.use_attention_mask
    captions = build.condition("crossattn")
    conditioning = model.encode_condition(captions, 3)
    ids, mask = model.tokenizer(captions)
    assert torch.equal(conditioning.attention_mask, mask.bool())
    torch.testing.assert_close(
        model.encode_condition(ids, 3, DROP).attention_mask,
        model.encode_condition(captions, 3, DROP).attention_mask,
    )
    z, t = torch.randn(3, 3, 4, 4), torch.tensor(500)
    expected = model.unet(z, t, conditioning.hidden_states, encoder_attention_mask=mask).sample
    torch.testing.assert_close(model.predict(z, t, conditioning), expected)
    noisy = conditioning.hidden_states + 9 * (mask == 0)[..., None]
    other = type(conditioning)(noisy, conditioning.attention_mask)
    torch.testing.assert_close(model.predict(z, t, other), expected)
    assert not build.model("crossattn").use_attention_mask


def test_a_module_makes_the_channels_to_append(build) -> None:
    rescale = nn.Conv2d(4, 2, 2, stride=2)
    model = build.model("concat", conditioner=rescale, train_conditioner=True)
    condition = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(model.encode_condition(condition, 3).concat, rescale(condition))
    assert not model.encode_condition(condition, 3, DROP).concat[DROP].any()


@pytest.fixture(scope="module")
def transformers_encoders() -> dict[str, nn.Module]:
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

    sizes = {
        "vocab_size": 100,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 8,
    }
    torch.manual_seed(0)
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return {
        "clip": CLIPTextModel(CLIPTextConfig(**sizes, **ends)).eval(),
        "bert": BertModel(BertConfig(**sizes)).eval(),
    }


def transformers_tokenizer(build, folder) -> Any:
    from transformers import AutoTokenizer

    build.tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_text_encoders_of_transformers(build, transformers_encoders, name, tmp_path) -> None:
    encoder = transformers_encoders[name]
    tokenizer = transformers_tokenizer(build, tmp_path)
    model = build.model("crossattn", conditioner=encoder, tokenizer=tokenizer).train()
    assert model.max_caption_length == 8
    assert model.use_attention_mask == (name == "bert")
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    captions = build.condition("crossattn")
    conditioning = model.encode_condition(captions, 3)
    tokens = tokenizer(captions, padding="max_length", max_length=8, return_tensors="pt")
    mask = tokens.attention_mask if name == "bert" else None
    expected = encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(conditioning.hidden_states, expected)
    assert (conditioning.attention_mask is not None) == (name == "bert")
    loss, _ = model.loss(torch.randn(3, 3, 4, 4), captions)
    loss.backward()
    assert model.unet.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "cond", "message"),
    [
        ("none", torch.zeros(3), "unconditional"),
        ("crossattn", None, "cond: missing; the model's conditioning is 'crossattn'"),
        ("crossattn", "a red cat", "expected a sequence of captions, got str"),
        ("crossattn", ["a", None, "b"], r"cond\[1\]: expected a caption, got None"),
        ("crossattn", ["a"], "got 1 conditions for 3 samples"),
        ("crossattn", torch.zeros(3, dtype=torch.int64), r"expected token ids \[B, L\]"),
        ("crossattn", torch.zeros(3, 12), r"expected a context \[B, L, D\], got \[3, 12\]"),
        ("classes", [0, 1, 7], "classes go from 0 to 7; accepted: 0 to 3"),
        ("classes", [0.5, 1, 2], r"expected integer classes \[B\], got list"),
        ("classes", torch.zeros(3), r"expected integer classes \[B\], got torch.float32 \[3\]"),
        ("class", torch.tensor([-1, 0, 0]), "classes go from -1 to 0; accepted: 0 to 3"),
        ("concat", torch.zeros(3, 3, 4, 4), "expected 2 channels to concatenate .*, got 3"),
        ("concat", torch.zeros(3, 2, 4), r"expected \[B, Cc, h, w\] to concatenate"),
        ("hybrid", {"crossattn": ["a"] * 3}, "expected a dict with 'crossattn' and 'concat'"),
        ("hybrid", ["a"] * 3, "expected a dict .*, got list"),
    ],
)
def test_bad_conditions_are_named(build, kind: str, cond: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build.model(kind).encode_condition(cond, 3)


def test_a_condition_of_another_size_is_refused(build) -> None:
    model = build.model("concat")
    with pytest.raises(DataError, match=r"concatenate is \[4, 4\], z is \[8, 8\]"):
        model.loss(torch.randn(3, 3, 8, 8), build.condition("concat"))


def test_guidance_needs_an_unconditional_class(build) -> None:
    embedder = ClassEmbedder(3, 12, with_unconditional_class=False)
    model = build.model("classes", conditioner=embedder)
    model.sample(class_labels=[0], num_inference_steps=1)
    with pytest.raises(ConfigError, match="with_unconditional_class"):
        model.sample(class_labels=[0], num_inference_steps=1, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unet": {"in_channels": 4}}, "in_channels: the UNet's are 4, .* has 3 latent channels"),
        ({"unet": {"out_channels": 4}}, "out_channels: the UNet's are 4, .* has 3 latent"),
        ({"conditioning": "concat"}, "appends at least one"),
        ({"conditioning": "class"}, "num_class_embeds"),
        ({"conditioning": "crossattn"}, "needs a UNet with cross-attention, and UNet2DModel"),
        ({"conditioning": "text"}, "conditioning: got 'text'; accepted: none, crossattn"),
        ({"conditioning_dropout": 0.1}, "conditioning_dropout: got 0.1; .* 0 for conditioning"),
    ],
)
def test_parts_that_do_not_fit_are_named(build, options: dict[str, Any], message: str) -> None:
    unet = build.unet(**options.pop("unet", {}))
    with pytest.raises(ConfigError, match=message):
        LatentDiffusion(build.first_stage(), unet, build.scheduler(), **options)


def test_widths_and_vocabularies_must_agree(build) -> None:
    def assemble(**options: Any) -> LatentDiffusion:
        return build.model("crossattn", **options)

    with pytest.raises(ConfigError, match="cross_attention_dim: the UNet's is 12, but TextEncoder"):
        assemble(conditioner=build.text_encoder(hidden_size=16))
    with pytest.raises(ConfigError, match="vocab_size: the text encoder's is 5, but the tokenizer"):
        assemble(conditioner=build.text_encoder(vocab_size=5))
    with pytest.raises(ConfigError, match="there is a tokenizer, but no text encoder"):
        assemble(conditioner=None)
    with pytest.raises(ConfigError, match="'none' has no use for a UNet with cross-attention"):
        assemble(conditioning="none", conditioner=None, tokenizer=None)
    with pytest.raises(ConfigError, match="there is a conditioner"):
        LatentDiffusion(build.first_stage(), build.unet(), build.scheduler(), build.text_encoder())
