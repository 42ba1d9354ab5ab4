"""What processors written for diffusers find on our attention."""

from __future__ import annotations

import diffusers.models.attention_processor as theirs
import pytest
import torch
from torch import nn

from fastldm.modules.attention import Attention
from fastldm.modules.attention_processor import (
    AttnProcessor,
    accepted_arguments,
    additive_mask,
    is_plain,
)


def pair(**options) -> tuple[theirs.Attention, Attention]:
    torch.manual_seed(0)
    options = {"heads": 2, "dim_head": 3, **options}
    expected = theirs.Attention(
        6, cross_attention_dim=5, processor=theirs.AttnProcessor(), **options
    )
    given = Attention(6, cross_attention_dim=5, **options)
    given.load_state_dict(expected.state_dict())
    return expected, given


@pytest.mark.parametrize("out_dim", [3, 4])
def test_heads_are_moved_as_diffusers_moves_them(out_dim):
    expected, given = pair()
    x = torch.randn(4, 7, 6)
    assert torch.equal(given.head_to_batch_dim(x, out_dim), expected.head_to_batch_dim(x, out_dim))
    assert torch.equal(given.batch_to_head_dim(x), expected.batch_to_head_dim(x))
    four = torch.randn(2, 3, 4, 6)
    assert torch.equal(given.head_to_batch_dim(four), expected.head_to_batch_dim(four))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_attention_weights_are_diffusers(masked, upcast):
    expected, given = pair(upcast_attention=upcast)
    query, key = torch.randn(4, 7, 3), torch.randn(4, 5, 3)
    mask = torch.randn(4, 7, 5) if masked else None
    torch.testing.assert_close(
        given.get_attention_scores(query, key, mask),
        expected.get_attention_scores(query, key, mask),
    )


@pytest.mark.parametrize("out_dim", [3, 4])
@pytest.mark.parametrize("length", [5, 3])
def test_masks_are_prepared_as_diffusers_prepares_them(out_dim, length):
    expected, given = pair()
    mask = torch.randn(2, 1, length)
    wanted = expected.prepare_attention_mask(mask, 5, 2, out_dim)
    assert torch.equal(given.prepare_attention_mask(mask, 5, 2, out_dim), wanted)
    assert given.prepare_attention_mask(None, 5, 2) is None


def test_a_bool_mask_becomes_one_that_is_added():
    mask = torch.tensor([[True, False]])
    assert torch.equal(additive_mask(mask, torch.float32), torch.tensor([[[0.0, -10000.0]]]))
    assert additive_mask(None, torch.float32) is None
    floating = torch.randn(1, 1, 2)
    assert additive_mask(floating, torch.float32) is floating


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, gain=1):
        return self.weight * gain * attn.attend(hidden_states, encoder_hidden_states)


def test_a_processor_with_weights_joins_and_leaves_the_model():
    _, attention = pair()
    x, context = torch.randn(2, 4, 6), torch.randn(2, 5, 5)
    plain = attention(x, context)
    attention.set_processor(Own())
    assert "processor.weight" in attention.state_dict()
    torch.testing.assert_close(attention(x, context, gain=3, other=1), 6 * plain)
    attention.set_processor(AttnProcessor())
    assert "processor.weight" not in attention.state_dict()
    assert torch.equal(attention(x, context), plain)


def test_only_processors_of_plain_attention_are_replaced():
    assert is_plain(AttnProcessor())
    assert is_plain(theirs.AttnProcessor2_0())
    assert is_plain(theirs.AttnProcessor())
    assert not is_plain(Own())
    ip = theirs.IPAdapterAttnProcessor2_0(hidden_size=6, cross_attention_dim=5)
    assert not is_plain(ip)
    assert "ip_adapter_masks" in accepted_arguments(ip)
    assert accepted_arguments(Own()) == {"gain"}
    assert accepted_arguments(AttnProcessor()) == frozenset()


def test_our_processor_called_as_one_gives_the_attention():
    _, attention = pair()
    x, context = torch.randn(2, 4, 6), torch.randn(2, 5, 5)
    assert torch.equal(attention.processor(attention, x, context), attention(x, context))
