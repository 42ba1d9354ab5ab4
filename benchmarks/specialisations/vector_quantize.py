"""The CUDA sources of the codebook lookup; their kernels have no arguments to specialise on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import cuda_sources
from benchmarks.compilation import ARCHITECTURES
from benchmarks.cuda_sources import CudaKernel

SOURCES = ("cuda.cu", "cuda_backward.cu")
_LATENTS_OF_THREAD = 8
_WIDE_STORES = ("screen_narrow_kernel", "grad_latents_kernel")
_COLUMNS = (
    "kernel", "registers", "shared, KiB", "FFMA", "global loads", "global stores", "shared loads",
)  # fmt: skip
_NOTE = """
Each kernel has a path for contiguous runs, in 16 bytes a thread, and one for any strides, whose
widths stand beside. Narrow latents, D ≤ 8, are scored by `screen_narrow_kernel<D>`: a score takes
D FFMA and a maximum, and 16 bytes of shared memory feed 32 FFMA. Scratch memory is O(N + K·D).
"""


def unavailable() -> str | None:
    """Why the sources cannot be compiled here."""
    if cuda_sources.compiler() is None:
        return "there is no nvcc (in CUDA_HOME, or on the PATH)"
    return None


def section() -> tuple[str, list[str]]:
    """The page's part on these sources, and what is wrong with their kernels."""
    nvcc = cuda_sources.compiler()
    assert nvcc is not None
    folder = cuda_sources.ROOT / "csrc" / "vector_quantize"
    compiled = [
        [kernel for name in SOURCES for kernel in cuda_sources.kernels(folder / name, target, nvcc)]
        for target in ARCHITECTURES
    ]
    problems = [
        f"vector_quantize, sm_{target}: {text}"
        for target, found in zip(ARCHITECTURES, compiled, strict=True)
        for text in problems_of(found)
    ]
    lines = ["## vector_quantize", "", f"Compiled by nvcc {cuda_sources.release(nvcc)}.", _NOTE]
    return "\n".join([*lines, *_table(list(zip(*compiled, strict=True))), ""]), problems


def problems_of(found: Sequence[CudaKernel]) -> Iterator[str]:
    """What a kernel lacks of what makes it fast."""
    for kernel in found:
        name, _, argument = kernel.name.rstrip(">").partition("<")
        if kernel.local_bytes:
            yield f"{kernel.name} keeps {kernel.local_bytes} bytes a thread in local memory"
        if name in (*_WIDE_STORES, "screen_wide_kernel") and 16 not in kernel.loads:
            yield f"{kernel.name} loads in {kernel.loads} bytes a thread"
        if name in _WIDE_STORES and 16 not in kernel.stores:
            yield f"{kernel.name} stores in {kernel.stores} bytes a thread"
        if name.startswith("screen") and kernel.shared_loads != (16,):
            yield f"{kernel.name} loads in {kernel.shared_loads} bytes from shared memory"
        # Of four codes with the thread's latents, or of 8 × 8 products and 16 channels.
        least = 4 * _LATENTS_OF_THREAD * int(argument) if name == "screen_narrow_kernel" else 0
        least = 8 * 8 * 16 if name == "screen_wide_kernel" else least
        if kernel.multiply_adds < least:
            yield f"{kernel.name} has {kernel.multiply_adds} FFMA, not {least}"


def _table(by_kernel: Sequence[Sequence[CudaKernel]]) -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|" + " --- |" * len(_COLUMNS)
    for versions in by_kernel:
        rows = [
            (
                str(kernel.registers),
                f"{kernel.shared_bytes / 1024:.3g}",
                str(kernel.multiply_adds),
                *("+".join(map(str, widths)) for widths in (kernel.loads, kernel.stores)),
                "+".join(map(str, kernel.shared_loads)),
            )
            for kernel in versions
        ]
        cells = [
            " / ".join(cell if len(set(cell)) > 1 else cell[:1]) for cell in zip(*rows, strict=True)
        ]
        yield f"| `{versions[0].name}` | {' | '.join(cells)} |"
