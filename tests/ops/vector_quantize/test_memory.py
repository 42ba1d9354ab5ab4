"""Peak memory of the lookup beside its operands and results: no matrix of N × K."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastldm.ops import _extension

CODE = """
import resource, torch
from fastldm import ops

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

ops.vector_quantize(torch.randn(1, 3, 8, 8), torch.randn(9, 3))
for latents, depth, codes in [(16384, 3, 8192), (4096, 4, 16384), (1024, 8, 16384),
                              (65536, 4, 256), (4096, 256, 1024)]:
    z, codebook = torch.randn(1, depth, latents, 1), torch.randn(codes, depth)
    before = peak()
    ops.vector_quantize(z, codebook)
    print(peak() - before)
"""


@pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))
def test_peak_memory() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    grown = [int(line) for line in result.stdout.split()]
    assert len(grown) == 5
    assert max(grown) < 32 * 2**20
