"""Noise that belongs to a sample of a step."""

from __future__ import annotations

import torch

from fastldm.training.noise import Stream, generators, integers, normal, uniform


def test_a_sample_has_the_same_noise_however_the_batch_is_split() -> None:
    whole = normal(generators(3, Stream.NOISE, 5, range(8)), (2, 3))
    parts = [normal(generators(3, Stream.NOISE, 5, positions), (2, 3))
             for positions in (range(3), range(3, 4), range(4, 8))]  # fmt: skip
    assert torch.equal(whole, torch.cat(parts))


def test_seed_stream_step_and_position_all_matter() -> None:
    draws = [
        normal(generators(*arguments), (50,))[0]
        for arguments in (
            (0, Stream.NOISE, 0, range(1)),
            (1, Stream.NOISE, 0, range(1)),
            (0, Stream.TIMESTEP, 0, range(1)),
            (0, Stream.NOISE, 1, range(1)),
            (0, Stream.NOISE, 0, range(1, 2)),
        )
    ]
    assert torch.corrcoef(torch.stack(draws)).triu(1).abs().max() < 0.6
    assert len({tuple(draw.tolist()) for draw in draws}) == 5


def test_distributions() -> None:
    sources = generators(0, Stream.NOISE, 0, range(2000))
    z = normal(sources, (20,))
    assert abs(z.mean().item()) < 0.02
    assert abs(z.std().item() - 1) < 0.02
    u = uniform(generators(0, Stream.DROPOUT, 0, range(2000)))
    assert abs(u.mean().item() - 0.5) < 0.03
    assert u.min() >= 0
    assert u.max() < 1
    t = integers(generators(0, Stream.TIMESTEP, 0, range(2000)), 10)
    assert torch.bincount(t, minlength=10).min() > 140
    assert t.dtype == torch.int64
    assert t.max() == 9
