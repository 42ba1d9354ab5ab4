"""The search for the largest batch."""

from __future__ import annotations

from collections.abc import Callable


def largest_batch(why_not: Callable[[int], str | None], limit: int) -> tuple[int, str]:
    """Find the largest batch size that works, by doubling and then halving the gap.

    Args:
        why_not: the reason why a batch size does not work, or None; one that does not work is
            followed by none that does.
        limit: the largest to be tried.

    Returns:
        The batch size, 0 where not even one image works, and what keeps it from being larger.
    """
    works, fails, reason = 0, limit + 1, f"max_batch_size = {limit}"
    candidate = 1
    while candidate < fails:
        problem = why_not(candidate)
        if problem is None:
            works = candidate
            candidate *= 2
            if candidate >= fails and works < fails - 1:
                candidate = fails - 1 if fails == limit + 1 else (works + fails) // 2
        else:
            fails, reason = candidate, problem
            candidate = (works + fails) // 2
        if candidate <= works:
            break
    return works, reason
