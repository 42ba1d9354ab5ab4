"""The codebook: lookup statistics, moving averages, revival and initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastldm.errors import ConfigError
from fastldm.modules.quantize import VectorQuantizer


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantizer(num_embeddings: int = 8, dim: int = 3, **options) -> VectorQuantizer:
    torch.manual_seed(0)
    module = VectorQuantizer(num_embeddings, dim, **options)
    torch.nn.init.normal_(module.embedding.weight)
    if module.ema_decay is not None:
        module.ema_sums.copy_(module.embedding.weight)
    return module


def test_codes_begin_uniform_within_one_over_their_number():
    weight = VectorQuantizer(50, 100).embedding.weight
    largest = float(weight.detach().abs().max())
    assert 0.99 / 50 < largest <= 1 / 50
    assert abs(float(weight.detach().mean())) < 0.001


def test_each_latent_gets_its_nearest_code():
    module = quantizer().double()
    z = latents(2, 3, 4, 5, dtype=torch.float64)
    output = module(z)
    rows = z.movedim(1, -1).reshape(-1, 3)
    distances = (rows[:, None] - module.embedding.weight[None]).square().sum(-1)
    assert torch.equal(output.indices, distances.argmin(1).view(2, 4, 5))
    codes = module.embedding.weight[output.indices].movedim(-1, 1)
    torch.testing.assert_close(output.z_q, codes, rtol=1e-12, atol=1e-12)
    error = (z - codes).square().mean()
    torch.testing.assert_close(output.codebook_loss, error)
    torch.testing.assert_close(output.commitment_loss, error)


def test_each_loss_moves_its_own_side():
    module = quantizer().double()
    z = latents(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    output = module(z)
    weight = module.embedding.weight
    upstream = latents(2, 3, 4, 5, seed=1, dtype=torch.float64)
    (straight,) = torch.autograd.grad(output.z_q, z, upstream, retain_graph=True)
    assert torch.equal(straight, upstream)
    difference = 2 * (z - output.z_q).detach() / z.numel()
    moved = torch.autograd.grad(
        output.commitment_loss, (z, weight), retain_graph=True, allow_unused=True
    )
    torch.testing.assert_close(moved[0], difference)
    assert moved[1] is None or not moved[1].any()
    moved = torch.autograd.grad(output.codebook_loss, (z, weight), allow_unused=True)
    assert moved[0] is None or not moved[0].any()
    expected = torch.zeros_like(weight)
    expected.index_add_(0, output.indices.flatten(), -difference.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(moved[1], expected)


def test_perplexity_and_usage_are_those_of_the_histogram():
    module = VectorQuantizer(4, 1)
    with torch.no_grad():
        module.embedding.weight.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    output = module(torch.tensor([0.0, 0.1, 1.0, 3.0]).view(1, 1, 2, 2))
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert float(output.perplexity) == pytest.approx(math.exp(entropy))
    assert float(output.usage) == 0.75
    even = module(torch.arange(4.0).view(1, 1, 2, 2))
    assert float(even.perplexity) == pytest.approx(4.0)
    assert float(module(torch.zeros(1, 1, 2, 2)).perplexity) == pytest.approx(1.0)


def test_entries_are_looked_up_by_index():
    module = quantizer()
    indices = torch.arange(8)
    assert torch.equal(module.get_codebook_entry(indices), module.embedding.weight)
    shaped = module.get_codebook_entry(indices, (2, 2, 2, 3))
    assert shaped.shape == (2, 3, 2, 2)
    assert torch.equal(shaped[1, :, 0, 1], module.embedding.weight[5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantised_in_float32(dtype):
    module = quantizer()
    z = latents(2, 3, 4, 4).to(dtype)
    exact = module(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(z)
    assert torch.equal(mixed.indices, exact.indices)
    assert torch.equal(mixed.codebook_loss, exact.codebook_loss)
    assert mixed.codebook_loss.dtype == torch.float32
    assert torch.equal(mixed.z_q, exact.z_q.to(dtype))


def test_moving_averages_follow_the_formula():
    decay, eps, module = 0.8, 1e-5, quantizer(ema_decay=0.8)
    counts = torch.ones(8, dtype=torch.float64)
    codes = module.embedding.weight.double()
    sums = codes.clone()
    for step in range(3):
        z = latents(2, 3, 4, 5, seed=step)
        rows = z.movedim(1, -1).reshape(-1, 3).double()
        chosen = (rows[:, None] - codes[None]).square().sum(-1).argmin(1)
        one_hot = torch.nn.functional.one_hot(chosen, 8).double()
        module.train()(z)
        counts = decay * counts + (1 - decay) * one_hot.sum(0)
        sums = decay * sums + (1 - decay) * one_hot.T @ rows
        smoothed = (counts + eps) / (counts.sum() + 8 * eps) * counts.sum()
        codes = sums / smoothed[:, None]
        torch.testing.assert_close(module.embedding.weight.double(), codes, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.ema_counts.double(), counts, rtol=1e-5, atol=1e-6)


def test_moving_averages_find_the_means_of_clusters():
    centres = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    module = VectorQuantizer(3, 2, ema_decay=0.7)
    with torch.no_grad():
        module.embedding.weight.copy_(centres + 0.8)
        module.ema_sums.copy_(module.embedding.weight)
    for step in range(40):
        noise = 0.05 * latents(3, 60, 2, seed=step)
        module((centres[:, None] + noise).flatten(0, 1)[:, :, None])
    torch.testing.assert_close(module.embedding.weight.data, centres, rtol=0.0, atol=0.02)


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_nothing_is_learned_outside_training(mode):
    module = quantizer(ema_decay=0.9, dead_code_threshold=1.0, initialization="data")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    if mode == "eval":
        module.eval()(latents(2, 3, 4, 4))
    else:
        with torch.no_grad():
            module.train()(latents(2, 3, 4, 4))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_dead_codes_become_latents_of_the_batch(ema_decay):
    module = quantizer(ema_decay=ema_decay, dead_code_threshold=0.9).train()
    with torch.no_grad():
        module.embedding.weight[3:] = 1e3
        if ema_decay is not None:
            module.ema_sums.copy_(module.embedding.weight)
    kept = module.embedding.weight[:3].clone()
    z = latents(4, 3, 5, 5)
    for _ in range(20):
        output = module(z)
        # The update must not disturb the backward pass of the batch that caused it.
        if ema_decay is None:
            (output.codebook_loss + output.commitment_loss).backward()
        if float(module.embedding.weight.detach().abs().max()) < 1e3:
            break
    rows = z.movedim(1, -1).reshape(-1, 3)
    revived = module.embedding.weight[3:].detach()
    assert torch.cdist(revived, rows).min(1).values.max() < 1e-5
    assert len({tuple(row.tolist()) for row in revived}) > 1
    assert torch.equal(module.ema_counts[3:], torch.full((5,), 1.8))
    if ema_decay is None:
        assert torch.equal(module.embedding.weight[:3], kept)
    assert float(module(z).usage) > 3 / 8


def test_revival_uses_every_code_where_the_gradient_alone_collapses():
    torch.manual_seed(0)
    usages = []
    for threshold in (None, 0.5):
        module = VectorQuantizer(32, 4, dead_code_threshold=threshold)
        torch.nn.init.constant_(module.embedding.weight, 5.0)
        module.train()
        for step in range(200):
            output = module(latents(8, 4, 4, 4, seed=step))
        usages.append(float(output.usage))
    assert usages[0] == 1 / 32
    assert usages[1] > 0.6


def test_data_initialisation_is_the_k_means_of_the_first_batch_only():
    centres = torch.tensor([[-9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, -9.0]])
    z = centres.repeat(16, 1)[:, :, None] + 0.1 * latents(64, 2, 1)
    torch.manual_seed(3)
    module = VectorQuantizer(4, 2, initialization="data", ema_decay=0.9).train()
    first = module(z)
    assert bool(module.data_initialized)
    # Lloyd's iterations leave each code at the mean of its latents.
    codes = z[:, :, 0]
    chosen = first.indices.flatten()
    for code in chosen.unique():
        found = first.z_q.detach()[chosen == code][0, :, 0]
        torch.testing.assert_close(found, codes[chosen == code].mean(0), rtol=1e-4, atol=1e-4)
    assert float(first.commitment_loss) < float(z.square().mean())
    before = module.embedding.weight.clone()
    module(z + 50.0)
    assert float((module.embedding.weight - before).abs().max()) < 50.0


def test_buffers_exist_only_with_their_options():
    assert set(VectorQuantizer(4, 2).state_dict()) == {"embedding.weight"}
    assert set(VectorQuantizer(4, 2, dead_code_threshold=1.0).state_dict()) == {
        "embedding.weight",
        "ema_counts",
    }
    assert set(VectorQuantizer(4, 2, ema_decay=0.9).state_dict()) == {
        "embedding.weight",
        "ema_counts",
        "ema_sums",
    }


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "dead_code_threshold": 0.5}])
def test_lookup_and_update_compile_without_a_graph_break(options):
    z = latents(2, 3, 4, 4)
    results = []
    for compiled in (False, True):
        module = quantizer(**options).train()
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        output = call(z)
        results.append([output.z_q, output.commitment_loss, output.perplexity])
        results[-1].append(module.embedding.weight)
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


RANK = """\
import sys
import torch
import torch.distributed as dist
from fastldm.modules.quantize import VectorQuantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)
torch.manual_seed(0)
module = VectorQuantizer(8, 3, ema_decay=0.8).train()
for step in range(3):
    generator = torch.Generator().manual_seed(step)
    z = torch.randn(4, 3, 4, 4, generator=generator)
    output = module(z.chunk(2)[rank])
reviving = VectorQuantizer(8, 3, ema_decay=0.5, dead_code_threshold=2.0)
torch.manual_seed(rank)
for step in range(5):
    reviving(torch.randn(2, 3, 4, 4))
seeded = VectorQuantizer(8, 3, initialization="data")
seeded.embedding.weight.data.zero_()
seeded(torch.randn(2, 3, 4, 4))
torch.save(
    [
        module.state_dict(),
        output.perplexity,
        reviving.state_dict(),
        seeded.state_dict(),
    ],
    f"{folder}/{rank}.pt",
)
dist.destroy_process_group()
"""


def test_processes_learn_the_same_codebook_as_one_with_the_whole_batch(
    tmp_path: Path, run_ranks: Callable[..., None]
) -> None:
    """Two gloo processes with half a batch each, against one with all of it."""
    run_ranks(RANK, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    torch.manual_seed(0)
    module = VectorQuantizer(8, 3, ema_decay=0.8).train()
    for step in range(3):
        output = module(latents(4, 3, 4, 4, seed=step))
    for states, perplexity, reviving, seeded in results:
        for name, value in module.state_dict().items():
            torch.testing.assert_close(states[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(perplexity, output.perplexity)
        for name in reviving:
            assert torch.equal(reviving[name], results[0][2][name]), name
        assert torch.equal(seeded["embedding.weight"], results[0][3]["embedding.weight"])
        assert seeded["embedding.weight"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 0}, "num_vq_embeddings"),
        ({"ema_decay": 0.0}, "codebook_ema_decay"),
        ({"dead_code_threshold": 0.0}, "dead_code_threshold"),
        ({"initialization": "zeros"}, "codebook_initialization.*'zeros'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        VectorQuantizer(**{"num_embeddings": 4, "embedding_dim": 2, **options})
