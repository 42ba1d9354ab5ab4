"""One call at one size: ours and its peers, checked against float64 and then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.records import Row

OURS = "fastldm"
COPY = "copy"

_TIMES_PLAIN = 2.0
_TIMES_PLAIN_OF_PEERS = 8.0


@dataclass
class Contest:
    """Who computes the same thing, and what makes it right."""

    contestants: dict[str, Callable[[], Sequence[Tensor]]]
    check: Callable[[str, Sequence[Tensor]], None]
    """Raises AssertionError for the result of a contestant."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Peers that do not take part, and why."""


@dataclass(frozen=True)
class Case:
    """A contest that is yet to be prepared."""

    name: str
    bytes: int
    """Each input read once, each output written once."""
    prepare: Callable[[], Contest]
    flops: float = 0.0
    rate: str | None = None
    """Dtype of the matrix rate that `flops` are held against."""
    is_target: bool = False
    """Whether the operator's target is set for this size."""


def measure_all(cases: Iterable[Case], clock: Clock) -> Iterator[Row]:
    """The row of each case, as soon as it is measured."""
    for case in cases:
        yield measure(case, clock)


def measure(case: Case, clock: Clock) -> Row:
    """Medians in microseconds of all whose result is right; whose is not is not timed."""
    row: Row = {
        "case": case.name, "bytes": case.bytes, "flops": case.flops, "rate": case.rate,
        "is_target": case.is_target,
    }  # fmt: skip
    with clock.on_stream():
        try:
            contest = case.prepare()
        except Exception as error:
            return {**row, "problem": f"{case.name}: {_told(error)}"}
        right: dict[str, Callable[[], Any]] = {}
        left_out = dict(contest.left_out)
        for name, call in contest.contestants.items():
            try:
                contest.check(name, call())
            except Exception as error:
                left_out[name] = _told(error)
                if name == OURS:
                    row["problem"] = f"{case.name}: {left_out[name]}"
            else:
                right[name] = call
        times = clock.times(right)
    row["cold_us"] = {name: round(found.cold * 1e6, 3) for name, found in times.items()}
    row["warm_us"] = {name: round(found.warm * 1e6, 3) for name, found in times.items()}
    row["how"] = {name: found.how for name, found in times.items()}
    row["left_out"] = left_out
    return row


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:400]}"


def check_against(
    exact: Sequence[Tensor], plain: Sequence[Tensor]
) -> Callable[[str, Sequence[Tensor]], None]:
    """At most twice the error of plain torch in the same dtype, plus 2 ulp; more for peers."""

    def check(name: str, found: Sequence[Tensor]) -> None:
        factor = _TIMES_PLAIN if name == OURS else _TIMES_PLAIN_OF_PEERS
        for index, (got, same_dtype, truth) in enumerate(zip(found, plain, exact, strict=True)):
            assert got.shape == truth.shape, f"result {index} has shape {list(got.shape)}"
            error = (got.double() - truth).abs().max().item()
            allowed = factor * (same_dtype.double() - truth).abs().max().item()
            allowed += factor * torch.finfo(got.dtype).eps * truth.abs().max().item()
            assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"

    return check


def copy_of_bytes(count: int, device: str) -> tuple[Callable[[], Sequence[Tensor]], Tensor]:
    """A copy that reads and writes `count` bytes in all, and what it is to result in."""
    source = torch.randint(-128, 128, (max(count // 2, 1),), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),), source


def with_copy(contest: Contest, count: int, device: str) -> Contest:
    """The same contest and a copy that moves as many bytes."""
    copy, source = copy_of_bytes(count, device)

    def check(name: str, found: Sequence[Tensor]) -> None:
        if name == COPY:
            assert torch.equal(found[0], source), "the copy differs"
        else:
            contest.check(name, found)

    return Contest({**contest.contestants, COPY: copy}, check, contest.left_out)
