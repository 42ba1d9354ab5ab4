"""The random numbers of the sampling steps, against published vectors and scalar arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastldm.ops.diffusion_step.reference import guide, limit, philox_4x32, philox_normal

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    result = philox_4x32(words(counter), words(key))
    assert " ".join(f"{int(word):08x}" for word in result) == expected


def scalar_philox(index: int, offset: int, seed: int) -> list[int]:
    """Philox4x32-10 on Python's unbounded integers."""
    mask = 2**32 - 1
    counter = [index & mask, index >> 32, offset & mask, offset >> 32]
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & mask,
            (first >> 32) ^ counter[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def scalar_normal(position: int, offset: int, seed: int) -> float:
    block = scalar_philox(position // 4, offset, seed)
    a, b = block[:2] if position % 4 < 2 else block[2:]
    u = float(np.float32(np.float32(a >> 1) + np.float32(1))) * 2.0**-31
    angle = 2 * math.pi * (b >> 8) * 2.0**-24
    turn = math.cos if position % 2 == 0 else math.sin
    return math.sqrt(-2 * math.log(u)) * turn(angle)


SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 0xDEADBEEF_12345678, 2**64 - 1]


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offset", [0, 999, 2**32 + 5, 2**63 - 1])
def test_noise_is_that_of_the_scalar_definition(seed, offset):
    shape = torch.Size([2, 3, 1, 5])
    state = torch.tensor([signed(seed)]), torch.tensor(offset)
    expected = torch.tensor(
        [scalar_normal(position, offset, seed) for position in range(30)], dtype=torch.float64
    ).reshape(shape)
    single = philox_normal(shape, torch.float32, *state)
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(philox_normal(shape, dtype, *state), single.to(dtype))


def test_the_transform_is_single_rounded_operations():
    """In numpy's float32, whose every operation is rounded correctly: the same bits."""
    number = np.float32
    words = [np.array(w) for w in zip(*(scalar_philox(i, 3, 5) for i in range(4000)), strict=True)]

    def series(z: np.ndarray, coefficients: list[float]) -> np.ndarray:
        total = np.full_like(z, number(coefficients[-1]))
        for coefficient in reversed(coefficients[:-1]):
            total = total * z + number(coefficient)
        return total

    lanes = []
    for a, b in (words[:2], words[2:]):
        u = ((a >> 1).astype(number) + number(1)) * number(2.0**-31)
        mantissa, exponent = np.frexp(u)
        is_small = mantissa < number(math.sqrt(0.5))
        mantissa = np.where(is_small, number(2) * mantissa, mantissa)
        s = (mantissa - number(1)) / (mantissa + number(1))
        artanh = number(2) * s * series(s * s, [1 / (2 * k + 1) for k in range(5)])
        radius = np.sqrt(
            number(-2) * ((exponent - is_small).astype(number) * number(math.log(2)) + artanh)
        )
        position = b >> 8
        quarter = (position + 2**21) >> 22
        t = (position - (quarter << 22)).astype(number) * number(2 * math.pi * 2.0**-24)
        cosine = series(t * t, [(-1) ** k / math.factorial(2 * k) for k in range(6)])
        sine = t * series(t * t, [(-1) ** k / math.factorial(2 * k + 1) for k in range(6)])
        turns = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)]
        for part in (0, 1):
            lanes.append(radius * np.choose(quarter % 4, [turn[part] for turn in turns]))
    expected = torch.from_numpy(np.stack(lanes, -1).reshape(1, -1))
    found = philox_normal(expected.shape, torch.float32, torch.tensor([5]), torch.tensor(3))
    assert torch.equal(found, expected)


def test_a_samples_noise_does_not_depend_on_its_batch():
    seeds, offset = torch.tensor([7, -3, 7, 12]), torch.tensor(41)
    batch = philox_normal(torch.Size([4, 3, 5]), torch.float32, seeds, offset)
    for row, seed in enumerate(seeds):
        alone = philox_normal(torch.Size([1, 3, 5]), torch.float32, seed.reshape(1), offset)
        assert torch.equal(batch[row], alone[0])
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])


def test_noise_of_an_empty_batch_is_empty():
    for rows in (1, 0):
        seeds = torch.zeros(rows, dtype=torch.int64)
        noise = philox_normal(torch.Size([0, 3, 4]), torch.float32, seeds, torch.tensor(0))
        assert noise.shape == (0, 3, 4)


def kolmogorov_smirnov(values: torch.Tensor) -> float:
    """√n·sup|F_n − Φ|; above 1.95 with a probability of 0.001 for true normal numbers."""
    ordered = values.double().flatten().sort().values
    count = ordered.numel()
    normal = torch.special.ndtr(ordered)
    rank = torch.arange(count + 1, dtype=torch.float64) / count
    return math.sqrt(count) * float(torch.maximum(rank[1:] - normal, normal - rank[:-1]).max())


@pytest.mark.parametrize("seed", [0, 20260101])
def test_noise_is_standard_normal_and_independent(seed):
    noise = philox_normal(
        torch.Size([1, 400_000]), torch.float32, torch.tensor([seed]), torch.tensor(3)
    ).flatten()
    count = noise.numel()
    values = noise.double()
    # Standard errors of the first four moments of n standard normal numbers.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs(float((values**power).mean()) - expected)
        assert error < 4 * math.sqrt(variance / count), power
    for lane in range(4):
        assert kolmogorov_smirnov(noise[lane::4]) < 1.95, lane
    for lag in (1, 2, 3, 4, 5, 64):
        correlation = float((values[:-lag] * values[lag:]).mean())
        assert abs(correlation) < 4 / math.sqrt(count), lag


def test_offsets_give_unrelated_noise():
    shape, seed = torch.Size([1, 100_000]), torch.tensor([5])
    first, second = (
        philox_normal(shape, torch.float64, seed, torch.tensor(offset)) for offset in (0, 1)
    )
    assert abs(float((first * second).mean())) < 4 / math.sqrt(shape.numel())


def test_rescaled_guidance_has_the_conditional_deviation():
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind()
    full = guide(cond, uncond, 7.5, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), cond.flatten(1).std(1))
    plain, half = guide(cond, uncond, 7.5, 0.0), guide(cond, uncond, 7.5, 0.5)
    torch.testing.assert_close(plain, -6.5 * uncond + 7.5 * cond)
    torch.testing.assert_close(half, (full + plain) / 2)


def test_limit_prefers_the_threshold_and_scales_by_it():
    original = torch.tensor([[-3.0, 0.5, 2.0], [-3.0, 0.5, 2.0]])
    threshold = torch.tensor([1.0, 2.0])
    expected = torch.tensor([[-1.0, 0.5, 1.0], [-1.0, 0.25, 1.0]])
    assert torch.equal(limit(original, None, threshold), expected)
    assert torch.equal(limit(original, 1.5, None), original.clamp(-1.5, 1.5))
    assert limit(original, None, None) is original
