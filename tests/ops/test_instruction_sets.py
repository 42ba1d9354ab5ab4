"""The C++ kernels compiled for lesser instruction sets than this processor's, by the reference.

torch says which set serves its kernels and ours, once in a process: hence processes of their own.
The searches of the codebook lookup are switched within one; see vector_quantize/test_search.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops import _extension

HALVES_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)

pytestmark = pytest.mark.skipif(_extension.problem() is not None, reason=str(_extension.problem()))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability: str) -> None:
    result = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().lower() in (capability, "no avx")


def compare() -> str:
    """Hold every operator against its reference; torch's name for the instruction set."""
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (*HALVES_AND_FLOAT, torch.float64):
            _group_norm_silu(layout, dtype)
    for dtype in HALVES_AND_FLOAT:
        _geglu(dtype)
        _ddim_step(dtype)
        for keys, width in ((7, 7), (77, 40), (300, 24)):
            _cross_attention(dtype, keys, width)
    return torch.backends.cpu.get_cpu_capability()


def _by_both(
    function: Callable[[], Tensor], leaves: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """The result and the leaves' gradients: those of the C++ kernels and the reference's."""
    results = []
    for name in ("cpp", "reference"):
        with ops.backend(name):
            results.append(function())
    upstream = torch.randn(results[0].shape).to(results[0].dtype)
    found, expected = (
        [y.detach(), *(torch.autograd.grad(y, leaves, upstream) if leaves else ())] for y in results
    )
    return found, expected


def _group_norm_silu(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 24, 9, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(24).to(dtype).requires_grad_()
    found, expected = _by_both(lambda: ops.group_norm_silu(x, 4, weight, residual=x), (x, weight))
    torch.testing.assert_close(found, expected)


def _geglu(dtype: torch.dtype) -> None:
    hidden = (3 * torch.randn(9, 74)).to(dtype).requires_grad_()
    found, expected = _by_both(lambda: ops.geglu(hidden), (hidden,))
    torch.testing.assert_close(found, expected)


def _ddim_step(dtype: torch.dtype) -> None:
    sample, output, uncond = (torch.randn(2, 3, 19, 11).to(dtype) for _ in range(3))
    row = ops.ddim_coefficients(torch.tensor(0.3), torch.tensor(0.6), 0.5)
    found, expected = _by_both(
        lambda: (
            ops.ddim_step(
                sample, output, row, model_output_uncond=uncond, guidance_scale=5.0, seed=1
            ).prev_sample
        )
    )
    assert torch.equal(found[0], expected[0])


def _cross_attention(dtype: torch.dtype, keys: int, width: int) -> None:
    q, k, v = (torch.randn(2, n, 2, width).to(dtype).requires_grad_() for n in (37, keys, keys))
    mask = torch.rand(2, keys) < 0.7
    found, expected = _by_both(lambda: ops.cross_attention(q, k, v, key_mask=mask), (q, k, v))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    print(compare())
