"""Budgets in steps and minutes."""

from __future__ import annotations

import pytest

from fastldm.training.budget import Budget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps() -> None:
    budget = Budget(10, None, Clock())
    assert budget.progress() == 0
    assert budget.seconds_left() is None
    budget.step = 4
    assert budget.progress() == 0.4
    budget.step = 12
    assert budget.progress() == 1


def test_minutes_and_the_first_limit_counts() -> None:
    clock = Clock()
    budget = Budget(10, 2.0, clock)
    clock.now += 30
    assert budget.elapsed == 30
    assert budget.progress() == 0.25
    assert budget.progress(elapsed=60) == 0.5
    budget.step = 9
    assert budget.progress() == 0.9
    clock.now += 1000
    assert budget.progress() == 1
    assert budget.seconds_left() == 0


def test_time_left_is_the_nearer_limit() -> None:
    clock = Clock()
    budget = Budget(100, 60.0, clock)
    budget.step = 10
    clock.now += 20
    assert budget.seconds_left() == pytest.approx(180)
    assert Budget(None, 1.0, clock).seconds_left() == pytest.approx(60)


def test_a_restart_counts_what_was_before() -> None:
    clock = Clock()
    budget = Budget(100, 1.0, clock)
    clock.now += 500
    budget.restart(step=50, elapsed=30.0)
    assert budget.elapsed == 30
    assert budget.progress() == 0.5
    budget.step += 10
    clock.now += 5
    assert budget.elapsed == 35
    # 40 more steps at the half second that the ten since the restart took.
    assert budget.seconds_left() == pytest.approx(20)
