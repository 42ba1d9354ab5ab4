"""One network, computed by several: our kernels, plain torch, torch.compile and diffusers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

from fastldm import ops

FASTLDM, EAGER, COMPILED, DIFFUSERS = "fastldm", "eager", "torch.compile", "diffusers"
FASTLDM_COMPILED = "fastldm compiled"

PEERS = [
    pytest.param((EAGER, DIFFUSERS), id="uncompiled"),
    pytest.param((FASTLDM_COMPILED, COMPILED), id="compiled", marks=pytest.mark.slow),
]
"""Whom a test holds our kernels against; torch.compile takes minutes before it can be timed."""

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Of an operator's input, or of all contestants' weights: feature maps follow them."""

Results = Sequence[Tensor]
_LARGEST_ERROR = 1e-3


class Work(Protocol):
    """What a network is made to do, and its results."""

    def __call__(self, network: nn.Module) -> Results: ...


def contestants(
    network: nn.Module, work: Work, peers: Sequence[str], diffusers: Callable[[], nn.Module]
) -> dict[str, Callable[[], Results]]:
    """Our kernels first, then `peers`, all on the same weights and in agreement.

    Each has a copy of its own, so that a training step of one leaves the others as they are.

    Args:
        network: of ours.
        work: is given a network, again and again.
        peers: of FASTLDM_COMPILED (our kernels in what torch.compile makes of the rest), EAGER,
            COMPILED, DIFFUSERS.
        diffusers: builds the same network as diffusers has it, without its weights.

    Raises:
        AssertionError: a result differs from that of plain torch.
    """
    found = {FASTLDM: _under("auto", work, network)}
    torch._dynamo.reset()
    for peer in peers:
        twin: Any = diffusers() if peer == DIFFUSERS else copy.deepcopy(network)
        if peer == DIFFUSERS:
            twin.load_state_dict(network.state_dict())
            twin.to(next(network.parameters()).device).train(network.training)
        if peer in (COMPILED, FASTLDM_COMPILED):
            twin = torch.compile(twin)
        found[peer] = _under("auto" if peer == FASTLDM_COMPILED else "reference", work, twin)
    assert_agreement(found, _under("reference", work, copy.deepcopy(network))())
    return found


def _under(backend: str, work: Work, network: nn.Module) -> Callable[[], Results]:
    def call() -> Results:
        with ops.backend(backend):
            return work(network)

    return call


def assert_agreement(calls: Mapping[str, Callable[[], Results]], expected: Results) -> None:
    """Hold each call's results against `expected`, by the norm of the difference."""
    for name, call in calls.items():
        for got, want in zip(call(), expected, strict=True):
            error = (got - want).norm() / want.norm()
            assert error <= _LARGEST_ERROR, f"{name} differs from plain torch by {error:.2g}"


def diffusers_twin(
    network: Any, layout: torch.memory_format = torch.contiguous_format
) -> Callable[[], nn.Module]:
    """What builds diffusers' class of the same name with the same config, in a layout."""

    def build() -> nn.Module:
        kind = getattr(pytest.importorskip("diffusers"), type(network).__name__)
        known = inspect.signature(kind.__init__).parameters
        config = {key: value for key, value in network.config.items() if key in known}
        # What diffusers calls the width of a head is the number of heads.
        if heads := config.pop("num_attention_heads", None):
            config["attention_head_dim"] = heads
        built: nn.Module = kind(**config)
        return built.to(memory_format=layout)

    return build


def gradients(output: Tensor, inputs: Sequence[Tensor], network: nn.Module) -> Results:
    """Of a fixed sum of the output: by the inputs, and by all weights as one vector."""
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    # By name: modules may be registered in another order.
    weights = [weight for _, weight in sorted(network.named_parameters())]
    found = torch.autograd.grad(output, [*inputs, *weights], upstream)
    by_weights = torch.cat([gradient.flatten() for gradient in found[len(inputs) :]])
    return (*found[: len(inputs)], by_weights)
