"""Every test starts from the same random numbers, whatever ran before it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter, which it decides on when imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


ROOT = Path(__file__).resolve().parent.parent
_SECONDS_TO_HANG = 900
"""Long enough for a machine that does much else, whose imports of torch take a minute."""


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., None]:
    """Runs a script in two processes at once, each with its rank and further arguments.

    The script joins and leaves the process group by itself; one that fails ends the other.
    """

    def run(source: str, *arguments: object) -> None:
        script = tmp_path / "ranks.py"
        script.write_text(source)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, str(script), str(rank), *map(str, arguments)]
                with log.open("w") as output:
                    processes.append(
                        subprocess.Popen(
                            command, env=environment, stdout=output, stderr=subprocess.STDOUT
                        )
                    )
            end = time.monotonic() + _SECONDS_TO_HANG
            while time.monotonic() < end:
                states = [process.poll() for process in processes]
                if None not in states or any(states):
                    break
                time.sleep(0.05)
            assert states == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
        finally:
            for process in processes:
                process.kill()
                process.wait()

    return run


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def triton_device() -> Iterator[str]:
    """Where Triton kernels run: a GPU, or the CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with _fast_interpreter():
            yield "cpu"


@contextmanager
def _fast_interpreter() -> Iterator[None]:
    """Without patching triton.language anew in every call of a device function, 20 ms each."""
    from triton.runtime import interpreter

    slow = interpreter.InterpretedFunction.__call__
    patched: set[int] = set()

    def fast(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            return slow(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = fast
    yield
    interpreter.InterpretedFunction.__call__ = slow


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
