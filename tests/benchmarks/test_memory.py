"""Whether large tensors come on warm pages, in a process of its own, and what a call holds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from benchmarks.memory import peak_bytes

_FAULTS_OF_A_CLONE = """
import resource, torch
from benchmarks.memory import keep_freed_memory

assert keep_freed_memory()
x = torch.zeros(2**24)
for _ in range(12):  # until malloc has kept room for the alignment, too
    x.clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x.clone()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_clone_of_64_mb_faults_no_pages() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _FAULTS_OF_A_CLONE], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 100


def test_the_peak_is_what_lives_at_once_beside_what_was_there() -> None:
    x = torch.zeros(2**18)  # 1 MB

    def chain() -> torch.Tensor:
        first = x + 1
        second = first + 1
        del first
        return second + 1

    # The numbers of a sum are tensors, too.
    assert peak_bytes(chain, "cpu") == pytest.approx(2 * x.nbytes, abs=1024)
    assert peak_bytes(lambda: x.add_(1), "cpu") < 1024
