"""A contestant is timed where its result is right, and told of where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.clock import CpuClock
from benchmarks.gpu.contest import (
    COPY,
    OURS,
    Case,
    Contest,
    check_against,
    measure,
    with_copy,
)

EXACT = torch.linspace(1, 2, 8, dtype=torch.float64)
PLAIN = EXACT.half() + 0.01


def _case(ours: Callable[[], Sequence[Tensor]]) -> Case:
    def refuses() -> Sequence[Tensor]:
        raise RuntimeError("no kernel for this size")

    def prepare() -> Contest:
        return with_copy(
            Contest(
                {OURS: ours, "eager": lambda: (PLAIN,), "peer": refuses},
                check_against((EXACT,), (PLAIN,)),
                {"faiss": "not installed"},
            ),
            100,
            "cpu",
        )

    return Case("a case", 100, prepare, is_target=True)


def test_right_results_are_timed() -> None:
    row = measure(_case(lambda: (EXACT.half(),)), CpuClock())
    assert set(row["cold_us"]) == set(row["warm_us"]) == set(row["how"]) == {OURS, "eager", COPY}
    assert row["left_out"] == {
        "faiss": "not installed", "peer": "RuntimeError: no kernel for this size",
    }  # fmt: skip
    assert "problem" not in row
    assert row["is_target"]


def test_a_wrong_result_is_a_problem_and_not_timed() -> None:
    row = measure(_case(lambda: (EXACT.half() + 0.1,)), CpuClock())
    assert OURS not in row["cold_us"]
    assert row["problem"].startswith("a case: AssertionError: result 0: error 0.1")


def test_what_cannot_be_prepared_is_a_problem() -> None:
    def fails() -> Contest:
        raise torch.OutOfMemoryError("too large")

    row = measure(Case("a case", 0, fails), CpuClock())
    assert row["problem"] == "a case: OutOfMemoryError: too large"


@pytest.mark.parametrize("name", [OURS, "peer"])
def test_what_is_allowed(name: str) -> None:
    """Twice plain torch's error and 2 ulp; NaN never."""
    check = check_against((EXACT,), (PLAIN,))
    check(name, (EXACT.half() + 0.02,))
    with pytest.raises(AssertionError, match="allowed"):
        check(name, (EXACT.half() + 0.2,))
    with pytest.raises(AssertionError, match="error nan"):
        check(name, (EXACT.half() * torch.nan,))
    with pytest.raises(AssertionError, match="shape"):
        check(name, (EXACT[:4].half(),))
    if name == OURS:
        with pytest.raises(AssertionError, match="allowed"):
            check(name, (EXACT.half() + 0.04,))
