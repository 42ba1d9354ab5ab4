"""What each thread of the CUDA lookup does, run on the CPU: the reference's indices to the bit."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastldm.ops import backend, vector_quantize

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCATTERED, ALONG_LATENTS, ALONG_CHANNELS = range(3)

Lookup = Callable[..., tuple[Tensor, int]]


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory) -> Lookup:
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("device") / "logic.so"
    source = Path(__file__).with_name("device_logic.cpp")
    flags = [
        "-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror",
        "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc' / 'include'}",
        *os.environ.get("CXXFLAGS", "").split(),
    ]  # fmt: skip
    subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).lookup
    function.restype = ctypes.c_int64

    def call(z: Tensor, codebook: Tensor, access: int = SCATTERED) -> tuple[Tensor, int]:
        """z [B, D, H, W] → indices [B, H, W], and how many latents were searched exhaustively."""
        shape = (z.shape[0], *z.shape[2:])
        strides = (z.stride(0), *z.stride()[2:])
        indices = torch.full(shape, -1, dtype=torch.int64)
        array = ctypes.c_int64 * 3
        codes = codebook.float().contiguous()
        open_latents = function(
            ctypes.c_void_p(z.data_ptr()), DTYPES[z.dtype], access, 3, array(*shape),
            array(*strides), ctypes.c_int64(z.stride(1)), ctypes.c_void_p(codes.data_ptr()),
            ctypes.c_int64(len(codes)), ctypes.c_int64(codes.shape[1]),
            ctypes.c_void_p(indices.data_ptr()),
        )  # fmt: skip
        return indices, open_latents

    return call


def _expected(z: Tensor, codebook: Tensor) -> Tensor:
    with backend("reference"):
        return vector_quantize(z, codebook.float()).indices


def _random(depth: int, codes: int, size: tuple[int, int, int] = (2, 3, 24)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(depth + codes)
    batch, height, width = size
    return [
        torch.randn(batch, depth, height, width, generator=generator),
        torch.randn(codes, depth, generator=generator),
    ]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 40])
@pytest.mark.parametrize("codes", [1, 33, 500])
def test_every_depth(lookup: Lookup, depth: int, codes: int) -> None:
    z, codebook = _random(depth, codes)
    indices, open_latents = lookup(z, codebook)
    assert torch.equal(indices, _expected(z, codebook))
    # On a line codes are so dense that scores decide little.
    assert depth == 1 or open_latents <= indices.numel() // 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "access"), [
    (4, ALONG_LATENTS), (3, ALONG_CHANNELS), (8, ALONG_CHANNELS), (16, ALONG_LATENTS),
    (24, ALONG_CHANNELS), (3, SCATTERED), (16, SCATTERED),
])  # fmt: skip
def test_every_access(lookup: Lookup, dtype: torch.dtype, depth: int, access: int) -> None:
    z, codebook = _random(depth, 300)
    z = z.to(dtype)
    if access == ALONG_CHANNELS:
        z = z.contiguous(memory_format=torch.channels_last)
    if access == SCATTERED:
        z = torch.cat([z, z], 1)[:, ::2, :, :23]
    assert torch.equal(lookup(z, codebook, access)[0], _expected(z, codebook))


@pytest.mark.parametrize("depth", [3, 12])
def test_half_precision_values_of_every_size(lookup: Lookup, depth: int) -> None:
    """Subnormal, largest and infinite numbers."""
    z, codebook = _random(depth, 64)
    scales = torch.tensor([1e-8, 1e-6, 1.0, 6e4, 1e6]).repeat(30)[: z[:, 0].numel()]
    z = (z * scales.view(2, 1, 3, 24)).half()
    assert torch.equal(lookup(z, codebook)[0], _expected(z, codebook))


@pytest.mark.parametrize("depth", [6, 12])
def test_what_the_scores_cannot_decide_is_measured(lookup: Lookup, depth: int) -> None:
    """Latents and codes within a few ulp of one another, and codes that occur twice."""
    generator = torch.Generator().manual_seed(5)
    z = 1 + torch.randint(0, 8, (1, depth, 8, 24), generator=generator) * 2.0**-22
    codebook = 1 + torch.randint(0, 8, (70, depth), generator=generator) * 2.0**-22
    indices, _ = lookup(z, codebook.repeat(2, 1))
    assert torch.equal(indices, _expected(z, codebook))
    z, codebook = _random(depth, 40)
    indices, open_latents = lookup(z, codebook.repeat(2, 1))
    assert torch.equal(indices, _expected(z, codebook))
    assert open_latents > 0


@pytest.mark.parametrize("depth", [3, 12])
def test_subnormal_halves_amid_their_codes(lookup: Lookup, depth: int) -> None:
    z, codebook = _random(depth, 64)
    z, codebook = (z * 1e-6).half(), codebook * 1e-6
    assert torch.equal(lookup(z, codebook)[0], _expected(z, codebook))


@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
def test_codes_far_nearer_to_one_another_than_to_the_latents(
    lookup: Lookup, depth: int, scale: float
) -> None:
    """Where the scores order the codes otherwise than the distances, as rounded, do."""
    z, codebook = _random(depth, 200, (2, 20, 24))
    codebook *= scale
    assert torch.equal(lookup(z, codebook)[0], _expected(z, codebook))


@pytest.mark.parametrize("stride", [(2**31, 48, 1), (48, 2**30, 1)], ids=str)
def test_offsets_beyond_32_bits(lookup: Lookup, stride: tuple[int, ...]) -> None:
    """Of latents that lie far apart; the pages between them are never touched."""
    z, codebook = _random(4, 40, (2, 3, 12))
    z = z.half()
    batch, row, column = stride
    steps = (batch, 12, row, column)
    furthest = sum((size - 1) * step for size, step in zip(z.shape, steps, strict=True))
    assert furthest >= 2**31
    far = torch.empty(furthest + 1, dtype=torch.float16).as_strided(z.shape, steps).copy_(z)
    assert torch.equal(lookup(far, codebook)[0], _expected(z, codebook))


@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_large_common_offset(lookup: Lookup, depth: int, offset: float) -> None:
    z, codebook = _random(depth, 200)
    z, codebook = z + offset, codebook + offset
    assert torch.equal(lookup(z, codebook)[0], _expected(z, codebook))


@pytest.mark.parametrize("depth", [3, 12])
def test_infinity_and_nan(lookup: Lookup, depth: int) -> None:
    z, codebook = _random(depth, 200)
    codebook[:2] = torch.inf
    codebook[5] = 1e30
    z[0, 1, 0, 0], z[0, 0, 0, 1] = torch.inf, 1e25
    assert torch.equal(lookup(z, codebook)[0], _expected(z, codebook))
    z[1, 0, 1, 1] = torch.nan
    assert lookup(z, codebook)[0][1, 1, 1] == 0
    codebook[7] = torch.nan
    assert not lookup(z, codebook)[0].any()
