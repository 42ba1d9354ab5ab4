"""The search for the largest batch."""

from __future__ import annotations

import pytest

from fastldm.profiling.batches import largest_batch


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 64, 100])
@pytest.mark.parametrize("fits", [0, 1, 2, 3, 5, 31, 64, 99, 120])
def test_finds_the_largest_that_fits_in_few_tries(limit: int, fits: int) -> None:
    tried: list[int] = []

    def why_not(batch_size: int) -> str | None:
        tried.append(batch_size)
        return None if batch_size <= fits else f"no memory for {batch_size}"

    found, reason = largest_batch(why_not, limit)
    assert found == min(fits, limit)
    assert max(tried) <= limit
    assert len(tried) <= 16
    if fits >= limit:
        assert reason == f"max_batch_size = {limit}"
    else:
        assert reason == f"no memory for {found + 1}"
