"""The text encoder against diffusers' LDMBertModel, which is CompVis's BERTEmbedder."""

from __future__ import annotations

import pytest
import torch

from fastldm.errors import ConfigError, DataError
from fastldm.models import TextEncoder

SIZES = {"vocab_size": 50, "max_length": 9, "hidden_size": 24, "num_layers": 3}


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(**SIZES, num_heads=2, head_dim=8).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


def test_parameter_counts_of_the_published_models() -> None:
    with torch.device("meta"):
        text = TextEncoder(with_logits_head=True)
        small = TextEncoder(hidden_size=640, with_logits_head=True)
        layout = TextEncoder(8192, 92, 512, 16, with_logits_head=True)
        lean = TextEncoder()
    assert text.num_parameters() == 581_994_042
    assert small.num_parameters() == 186_154_682
    assert layout.num_parameters() == 58_858_496
    assert text.num_parameters() - lean.num_parameters() == 30522 * 1281


def test_keys_and_numbers_are_diffusers(encoder: TextEncoder, ids: torch.Tensor) -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    config = LDMBertConfig(
        vocab_size=50,
        max_position_embeddings=9,
        encoder_layers=3,
        encoder_ffn_dim=96,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=24,
        dropout=0.0,
    )
    theirs = LDMBertModel(config).double().eval()
    ours = TextEncoder(**SIZES, num_heads=2, head_dim=8, with_logits_head=True).double().eval()
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(ids).last_hidden_state
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    actual = ours(ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    actual.backward(upstream)
    expected.backward(upstream)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not name.startswith("to_logits"):
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-10, atol=1e-12)


def test_padding_is_attended_unless_masked(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    plain = TextEncoder(**SIZES).eval()
    masked = TextEncoder(**SIZES, use_attention_mask=True).eval()
    masked.load_state_dict(plain.state_dict())
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    assert torch.equal(plain(ids, mask)[0], plain(ids)[0])
    assert not torch.allclose(plain(ids, mask)[0][:, :5], plain(changed, mask)[0][:, :5])
    torch.testing.assert_close(masked(ids, mask)[0][:, :5], masked(changed, mask)[0][:, :5])
    torch.testing.assert_close(masked(ids, mask)[0][:, :5], plain(ids[:, :5])[0])
    assert torch.equal(masked(ids, mask.bool())[0], masked(ids, mask)[0])


def test_checkpointing_gives_the_same_gradients(encoder: TextEncoder, ids: torch.Tensor) -> None:
    upstream = torch.randn(2, 9, 24)
    encoder(ids).last_hidden_state.backward(upstream)
    expected = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    encoder.enable_gradient_checkpointing()
    calls = []
    encoder.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    encoder(ids).last_hidden_state.backward(upstream)
    assert len(calls) == 2
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_dropout_only_in_training(ids: torch.Tensor) -> None:
    encoder = TextEncoder(**SIZES, dropout=0.3)
    assert not torch.equal(encoder(ids)[0], encoder(ids)[0])
    encoder.eval()
    assert torch.equal(encoder(ids)[0], encoder(ids)[0])


def test_saved_and_loaded(encoder: TextEncoder, ids: torch.Tensor, tmp_path) -> None:
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert torch.equal(TextEncoder.from_pretrained(tmp_path)(ids)[0], encoder(ids)[0])


def test_compiles_without_a_break(encoder: TextEncoder, ids: torch.Tensor) -> None:
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids)[0], encoder(ids)[0])


def test_bad_input_is_named(encoder: TextEncoder) -> None:
    with pytest.raises(DataError, match=r"L ≤ 9 \(max_length\), got \[1, 10\]"):
        encoder(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(DataError, match=r"got \[9\]"):
        encoder(torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ConfigError, match="num_layers: expected at least 1, got 0"):
        TextEncoder(num_layers=0)
