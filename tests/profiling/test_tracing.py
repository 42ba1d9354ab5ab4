"""Times by family and peak memory, against calls of which both are known."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastldm.profiling import FAMILIES, narrow, tracing
from fastldm.profiling.tracing import WHOLE, of_operators, peak_memory, time_by_family
from fastldm.profiling.workloads import BACKENDS, Sampling, Training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sampling() -> Sampling:
    return Sampling(narrow(8, "vq", image_size=32), CPU, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_families_add_up_to_the_step(sampling: Sampling, backend: str) -> None:
    step = sampling.step(1, backend)
    step()
    found = time_by_family(step, CPU)
    assert set(found.by_family) == set(FAMILIES)
    assert found.accounted == pytest.approx(1, abs=0.03)
    for family in ("convolution", "attention", "norm", "update"):
        assert found.by_family[family] > 0
    assert found.by_family["lookup"] == 0


def test_families_add_up_to_a_training_step() -> None:
    step = Training(narrow(8, "kl", image_size=32), CPU, torch.float32).step(1)
    step()
    found = time_by_family(step, CPU)
    assert found.accounted == pytest.approx(1, abs=0.03)
    assert found.by_family["update"] > 0


def test_times_are_those_of_the_profilers_own_tree(sampling: Sampling) -> None:
    step = sampling.step(1)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(WHOLE):
        step()
    found = of_operators(profiler.profiler.kineto_results.events())
    expected = Counter(dict.fromkeys(FAMILIES, 0.0))
    for event in profiler.events():
        expected[tracing._family(event)] += 1e-6 * event.self_cpu_time_total
    assert found.by_family == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_decoding_has_a_lookup(sampling: Sampling) -> None:
    decode = sampling.decode(1)
    assert decode is not None
    decode()
    assert time_by_family(decode, CPU).by_family["lookup"] > 0


def test_a_slow_operator_is_found_in_its_family() -> None:
    a = torch.randn(600, 600)

    def call() -> None:
        for _ in range(10):
            a @ a
        a + a

    call()
    found = time_by_family(call, CPU)
    assert found.by_family["attention"] > 0.5 * found.whole


def test_peak_memory_is_the_most_at_once() -> None:
    def call() -> None:
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(2_000_000)
        third = torch.empty(1_000_000)
        del second, third

    assert peak_memory(call, CPU, held=100) == pytest.approx(100 + 12_000_000, rel=0.01)
