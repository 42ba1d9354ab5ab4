"""Random numbers that belong to a sample of a step, not to a process.

Each sample of the global batch has a generator seeded by (seed, stream, step, position), so that a
step draws the same noise whether one process computes it, two share it, or it is split into
micro-batches, and a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """Purposes that draw independent numbers for the same sample of the same step."""

    POSTERIOR = 1
    NOISE = 2
    TIMESTEP = 3
    DROPOUT = 4
    FLIP = 5
    VALIDATION = 6


def generators(seed: int, stream: Stream, step: int, positions: range) -> list[torch.Generator]:
    """One CPU generator for each position in the global batch of a step."""
    return [_generator(seed, stream, step, position) for position in positions]


def normal(sources: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 numbers [len(sources), *shape] on the CPU, a row a generator."""
    return torch.stack([torch.randn(*shape, generator=source) for source in sources])


def uniform(sources: Sequence[torch.Generator]) -> Tensor:
    """Uniform float32 numbers in [0, 1), [len(sources)], on the CPU."""
    return torch.cat([torch.rand(1, generator=source) for source in sources])


def integers(sources: Sequence[torch.Generator], high: int) -> Tensor:
    """Uniform int64 numbers 0…high−1, [len(sources)], on the CPU."""
    return torch.cat([torch.randint(high, (1,), generator=source) for source in sources])


def _generator(seed: int, stream: Stream, step: int, position: int) -> torch.Generator:
    entropy = np.random.SeedSequence([seed, int(stream), step, position])
    word = int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(word)
