"""Every test starts from the same random numbers, whatever ran before it."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter, which it decides on when imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The worst error of each tested module, as a share of what the oracle allows."""
    worst: dict[str, float] = {}
    reports = (r for found in terminalreporter.stats.values() for r in found)
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "error / allowed":
                module = report.nodeid.partition("::")[0]
                worst[module] = max(worst.get(module, 0.0), value)
    if worst:
        terminalreporter.section("worst error, as a share of what is allowed")
        for module, ratio in sorted(worst.items()):
            terminalreporter.write_line(f"{ratio:6.2f}  {module}")
