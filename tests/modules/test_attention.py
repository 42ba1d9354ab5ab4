"""Attention against diffusers', with every kind of mask against the plain formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention as TheirAttention

from fastldm import ops
from fastldm.errors import ConfigError
from fastldm.modules import attention
from fastldm.modules.attention import Attention

CASES = {
    "self, pixels": {
        "query_dim": 8,
        "heads": 1,
        "dim_head": 8,
        "bias": True,
        "norm_num_groups": 4,
        "residual_connection": True,
        "eps": 1e-6,
    },
    "self, tokens": {"query_dim": 8, "heads": 2, "dim_head": 5, "out_bias": False},
    "self, tokens, normed": {
        "query_dim": 8,
        "heads": 2,
        "dim_head": 4,
        "norm_num_groups": 2,
        "rescale_output_factor": 1.4,
        "upcast_attention": True,
    },
    "cross": {"query_dim": 8, "cross_attention_dim": 6, "heads": 2, "dim_head": 3},
    "layer-normed heads": {"query_dim": 8, "heads": 2, "dim_head": 4, "qk_norm": "layer_norm"},
    "rms-normed heads": {"query_dim": 8, "heads": 2, "dim_head": 4, "qk_norm": "rms_norm"},
}


def operands(config) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 8, 4, 5) if config.get("residual_connection") else (3, 20, 8)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64)]
    if "cross_attention_dim" in config:
        tensors.append(torch.randn(3, 7, 6, generator=generator, dtype=torch.float64))
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_diffusers(name):
    torch.manual_seed(0)
    config = CASES[name]
    ours = Attention(**config)
    theirs = TheirAttention(**config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.5)
    ours.load_state_dict(theirs.state_dict())
    # Upcasting is to float32, and so is diffusers' RMS norm: these cases are compared there.
    single = config.get("upcast_attention") or config.get("qk_norm") == "rms_norm"
    dtype = torch.float32 if single else torch.float64
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    results = []
    for module in (theirs.to(dtype), ours.to(dtype)):
        leaves = [x.to(dtype).requires_grad_() for x in operands(config)]
        output = module(*leaves)
        generator = torch.Generator().manual_seed(2)
        output.backward(torch.randn(output.shape, generator=generator, dtype=dtype))
        gradients = [leaf.grad for leaf in (*leaves, *module.parameters())]
        results.append([output.detach(), *gradients])
    largest = max(float(tensor.abs().max()) for tensor in results[0][1:])
    for expected, given in zip(*results, strict=True):
        assert given.shape == expected.shape
        error = float((given - expected).abs().max())
        assert error <= tolerance * max(float(expected.abs().max()), 0.1 * largest)


@pytest.mark.parametrize("name", CASES)
def test_a_cpu_attends_by_the_operator(name, monkeypatch):
    queries = []

    def attend(query, *operands, **options):
        queries.append(query.shape)
        return ops.cross_attention(query, *operands, **options)

    monkeypatch.setattr(attention, "ops", SimpleNamespace(cross_attention=attend))
    config = CASES[name]
    Attention(**config).double()(*operands(config))
    assert queries == [(3, 20, config["heads"], config["dim_head"])]


def plain_attention(module: Attention, x, context, bias) -> torch.Tensor:
    """softmax(q·kᵀ/√d + bias)·v, head by head; `bias` broadcasts to [B, H, Lq, Lk]."""

    def heads(layer, tokens):
        return layer(tokens).unflatten(-1, (module.heads, module.dim_head)).transpose(1, 2)

    q, k, v = heads(module.to_q, x), heads(module.to_k, context), heads(module.to_v, context)
    scores = q @ k.transpose(-1, -2) * module.dim_head**-0.5 + bias
    return module.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["key mask", "bool", "bias", "bias a head"])
@pytest.mark.parametrize("to_context", [False, True])
def test_masks_follow_the_formula(kind, to_context):
    torch.manual_seed(0)
    module = Attention(8, cross_attention_dim=6 if to_context else None, heads=2, dim_head=4)
    module.double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    context = torch.randn(3, 7, 6, dtype=torch.float64) if to_context else None
    keys = 7 if to_context else 5
    keep = torch.rand(3, 1, keys) > 0.4
    keep[..., 0] = True
    if kind == "key mask":
        mask, bias = keep[:, 0], torch.where(keep, 0.0, -torch.inf)[:, None]
    elif kind == "bool":
        mask, bias = keep, torch.where(keep, 0.0, -torch.inf)[:, None]
    else:
        mask = torch.randn(3, 2, 5, keys) if kind == "bias a head" else torch.randn(3, 1, keys)
        bias = mask if kind == "bias a head" else mask[:, None]
    given = module(x, context, attention_mask=mask)
    expected = plain_attention(module, x, x if context is None else context, bias.double())
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)


def test_masked_keys_have_no_influence():
    torch.manual_seed(0)
    module = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    x, context = torch.randn(1, 5, 8), torch.randn(1, 7, 6)
    mask = torch.arange(7)[None] < 4
    before = module(x, context, attention_mask=mask)
    context[:, 4:] = 1e3
    assert torch.equal(module(x, context, attention_mask=mask), before)


def test_unscaled_scores():
    torch.manual_seed(0)
    scaled, unscaled = (Attention(8, heads=2, dim_head=4, scale_qk=s) for s in (True, False))
    state = scaled.state_dict()
    unscaled.load_state_dict({**state, "to_q.weight": state["to_q.weight"] / 2.0})
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(unscaled(x), scaled(x))


def test_memory_format_follows_the_input():
    module = Attention(8, heads=1, dim_head=8, norm_num_groups=4, residual_connection=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 4, 6).to(memory_format=memory_format)
        assert module(x).is_contiguous(memory_format=memory_format)


def test_upcasting_computes_the_attention_in_float32():
    torch.manual_seed(0)
    module = Attention(8, heads=2, dim_head=4, upcast_attention=True).bfloat16()
    x = torch.randn(2, 5, 8).bfloat16()
    given = module(x)
    assert given.dtype == torch.bfloat16
    q, k, v = (
        layer(x).float().unflatten(-1, (2, 4)).transpose(1, 2)
        for layer in (module.to_q, module.to_k, module.to_v)
    )
    attended = ((q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = module.to_out[0](attended.bfloat16())
    torch.testing.assert_close(given, expected, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"qk_norm.*'l2'"):
        Attention(8, qk_norm="l2")
    with pytest.raises(ValueError, match=r"attention_mask.*float32"):
        Attention(8)(torch.zeros(1, 5, 8), attention_mask=torch.ones(1, 5))
