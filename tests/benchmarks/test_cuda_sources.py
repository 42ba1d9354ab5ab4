"""What is read out of the compiler's reports on CUDA kernels, and which kernels are refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import cuda_sources
from benchmarks.cuda_sources import CudaKernel, _read, _readable
from benchmarks.specialisations.vector_quantize import problems_of

GOOD = CudaKernel(
    name="screen_narrow_kernel<3>",
    registers=96,
    shared_bytes=4096,
    local_bytes=0,
    loads=(4, 16),
    stores=(16,),
    shared_loads=(16,),
    multiply_adds=96,
)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "_ZN7fastldm4cuda39_GLOBAL__N__de32a9a2_7_cuda_cu_7397c89020screen_narrow_kernelILi8EEE"
            "vNS_6device7LatentsElPKf",
            "screen_narrow_kernel<8>",
        ),
        (
            "_ZN7fastldm4cuda39_GLOBAL__N__de32a9a2_7_cuda_cu_7397c89013finish_kernelI6__halfEEvNS_",
            "finish_kernel<half>",
        ),
        (
            "_ZN7fastldm4cuda39_GLOBAL__N__de32a9a2_7_cuda_cu_7397c89013finish_kernelIfEEvNS_6dev",
            "finish_kernel<float>",
        ),
        (
            "_ZN7fastldm4cuda39_GLOBAL__N__de32a9a2_7_cuda_cu_7397c89013centre_kernelEPKfllPf",
            "centre_kernel",
        ),
    ],
)
def test_names(symbol: str, name: str) -> None:
    assert _readable(symbol) == name


def test_widths_and_resources() -> None:
    code = """
        /*0010*/  LDG.E.128 R4, [R2.64] ;
        /*0020*/  LDG.E.U16 R4, [R2.64] ;
        /*0030*/  LDG.E.CONSTANT R5, [R2.64] ;
        /*0040*/  LDS.128 R8, [R3] ;
        /*0050*/  FFMA R0, R4, R5, R8 ;
        /*0060*/  STG.E.64 [R2.64], R4 ;
    """
    usage = "REG:40 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:600 TEXTURE:0"
    assert _read("a_kernel", usage, code) == CudaKernel(
        "a_kernel", 40, 1024, 24, (2, 4, 16), (8,), (16,), 1
    )


def test_an_extension_older_than_its_sources_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library = tmp_path / "csrc" / "op" / "cuda.cu", tmp_path / "fastldm" / "_C.any.so"
    for path in (tmp_path / "setup.py", source, library):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (0, 1))
    monkeypatch.setattr(cuda_sources, "ROOT", tmp_path)
    assert cuda_sources._current_extension() is None
    os.utime(library, (0, 2))
    assert cuda_sources._current_extension() == library
    os.utime(source, (0, 3))
    assert cuda_sources._current_extension() is None
    library.unlink()
    assert cuda_sources._current_extension() is None


def test_the_kernels_of_one_source() -> None:
    named = [dataclasses.replace(GOOD, name=name) for name in ("b", "a", "c")]
    symbols = (
        "_N_0_7_cuda_cu_1b_kernel",
        "_N_0_7_cuda_cu_1a_kernel",
        "_N_0_16_cuda_backward_cu_1c",
    )
    found = dict(zip(symbols, named, strict=True))
    assert [k.name for k in cuda_sources._of_source(Path("csrc/op/cuda.cu"), found)] == ["a", "b"]
    assert [k.name for k in cuda_sources._of_source(Path("cuda_backward.cu"), found)] == ["c"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"local_bytes": 432}, "keeps 432 bytes a thread in local memory"),
        ({"loads": (4, 8)}, "loads in (4, 8) bytes a thread"),
        ({"stores": (4,)}, "stores in (4,) bytes a thread"),
        ({"shared_loads": (4, 16)}, "loads in (4, 16) bytes from shared memory"),
        ({"multiply_adds": 64}, "has 64 FFMA, not 96"),
    ],
)
def test_what_is_refused(changes: dict[str, object], problem: str) -> None:
    assert list(problems_of([GOOD])) == []
    (found,) = problems_of([dataclasses.replace(GOOD, **changes)])  # type: ignore[arg-type]
    assert found == f"{GOOD.name} {problem}"
