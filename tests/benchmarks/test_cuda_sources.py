"""What is read out of the compiler's reports on CUDA kernels, and which kernels are refused."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

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
