"""Build of the extension module `fastldm._C`; all metadata is in pyproject.toml.

The C++ sources are built where a C++ compiler works, the CUDA sources where a CUDA toolkit is
installed whose major version is that of torch's CUDA. Whether a GPU is visible never matters. No
compiler, or a failed build, leaves a package that runs on the reference operators.

``FASTLDM_BUILD`` decides otherwise: ``auto`` (default), ``cpp`` (never CUDA), ``cuda`` (with CUDA,
or no extension) or ``none``. ``FASTLDM_CXXFLAGS`` adds flags for the C++ compiler and the linker.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CPP_FLAGS = [
    "-O3",
    "-std=c++20",
    # A product and a sum are rounded apart, so that every processor finds the same nearest code.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
    "-Wno-psabi",
]
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
MODES = ("auto", "cpp", "cuda", "none")


class NotBuildableError(Exception):
    """Why the extension, or its CUDA part, is not built."""


def say(message: str) -> None:
    print(f"fastldm: {message}", file=sys.stderr, flush=True)


def sources(suffix: str, root: Path = ROOT) -> list[str]:
    """Source files under csrc, relative to `root` as setuptools wants them."""
    return sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob(f"*{suffix}"))


def compiler_flags() -> list[str]:
    """The flags that the C++ compiler takes, with OpenMP where it has it.

    Raises:
        NotBuildableError: no compiler, or one that compiles no shared library with these flags.
    """
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        raise NotBuildableError(
            f"there is no C++ compiler ({compiler[0]}); install one, such as g++"
        )
    added = os.environ.get("FASTLDM_CXXFLAGS", "").split()
    for flags in ([*CPP_FLAGS, "-fopenmp", *added], [*CPP_FLAGS, *added]):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <vector>\nint probe() { return std::vector<int>(1)[0]; }\n")
            result = subprocess.run(
                [*compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(source) + ".so"],
                capture_output=True,
                text=True,
                check=False,
            )
        if result.returncode == 0:
            return flags
    raise NotBuildableError(f"the C++ compiler {compiler[0]} fails: {result.stderr.strip()}")


def toolkit() -> tuple[Path, str]:
    """Folder and version of the CUDA toolkit in CUDA_HOME, or that of the nvcc on the PATH.

    Raises:
        NotBuildableError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise NotBuildableError("there is no CUDA toolkit (CUDA_HOME, or nvcc on the PATH)")
    # `--dryrun` names the toolkit also where nvcc is a script or a link to another place.
    dry = _output([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", _output([str(nvcc), "--version"]))
    if top is None or release is None:
        raise NotBuildableError(f"{nvcc} does not answer as a CUDA compiler does")
    return Path(top.group(1)).resolve(), release.group(1)


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def cuda_home(torch_cuda: str | None) -> Path:
    """The toolkit to build the CUDA sources with.

    Raises:
        NotBuildableError: there is none, or it is of another major version than torch's.
    """
    home, version = toolkit()
    if torch_cuda is None:
        raise NotBuildableError("this torch is built without CUDA")
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise NotBuildableError(
            f"the CUDA toolkit in {home} is {version} and torch is built for CUDA {torch_cuda}"
        )
    return home


def with_cuda(mode: str, torch_cuda: str | None) -> bool:
    """Whether to build the CUDA sources; sets the environment that torch's builder reads.

    Raises:
        NotBuildableError: CUDA is asked for by name and cannot be had.
    """
    has_sources = bool(sources(".cu"))
    if mode == "cpp" or (mode == "auto" and not has_sources):
        return False
    try:
        home = cuda_home(torch_cuda)
    except NotBuildableError as reason:
        if mode == "cuda":
            raise
        say(f"building the C++ extension without CUDA: {reason}")
        return False
    os.environ["CUDA_HOME"] = str(home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    return has_sources


def extension_arguments() -> dict[str, object]:
    """`ext_modules` and `cmdclass` for setup().

    Raises:
        NotBuildableError: no extension can be built; the message says why.
    """
    mode = os.environ.get("FASTLDM_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"FASTLDM_BUILD: got {mode!r}; accepted: {', '.join(MODES)}")
    if mode == "none":
        raise NotBuildableError("FASTLDM_BUILD=none")
    flags = compiler_flags()
    try:
        import torch
    except ImportError as error:
        raise NotBuildableError(f"torch cannot be imported to build against ({error})") from None
    cuda = with_cuda(mode, torch.version.cuda)
    # It reads CUDA_HOME when it is imported.
    from torch.utils import cpp_extension

    class OptionalBuild(cpp_extension.BuildExtension):  # type: ignore[misc]
        """A build whose failure is told and does not stop the installation."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                say(f"the extension is not built, the operators run on the reference: {error}")

    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = make(
        "fastldm._C",
        sources=sources(".cpp") + (sources(".cu") if cuda else []),
        include_dirs=[str(ROOT / "csrc" / "include"), str(ROOT / "csrc")],
        define_macros=[("FASTLDM_WITH_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "--fmad=false"]},
        extra_link_args=[flag for flag in flags if flag not in CPP_FLAGS],
        optional=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


if __name__ == "__main__":
    try:
        arguments = extension_arguments()
    except NotBuildableError as reason:
        say(f"installing without the extension: {reason}")
        arguments = {}
    setup(**arguments)
