"""What setup.py decides to build, and that a failed build never fails an installation."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build() -> ModuleType:
    """setup.py, imported: it then defines its functions and runs nothing."""
    specification = importlib.util.spec_from_file_location("fastldm_setup", ROOT / "setup.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _fake_toolkit(home: Path, release: str = "13.0") -> Path:
    _script(
        home / "bin" / "nvcc",
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.88"\n'
        f'[ "$1" = --dryrun ] && echo "#$ TOP={home}/bin/.." >&2\nexit 0',
    )
    return home


def _copy_of_the_sources(folder: Path) -> Path:
    for name in ("configs", "csrc", "fastldm"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("fastldm\n")
    return folder


def _build_in_place(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "FASTLDM_BUILD": "auto", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_sources_are_found_by_suffix(build: ModuleType, tmp_path: Path) -> None:
    assert "csrc/bindings.cpp" in build.sources(".cpp")
    for name in ("a/cuda.cu", "a/cpu.cpp", "b/kernel.cu", "b/notes.txt"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert build.sources(".cu", tmp_path) == ["csrc/a/cuda.cu", "csrc/b/kernel.cu"]


def test_no_two_sources_share_an_object_file(build: ModuleType) -> None:
    objects = [source.rpartition(".")[0] for source in build.sources(".cpp") + build.sources(".cu")]
    assert len(set(objects)) == len(objects)


def test_toolkit_of_cuda_home(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(_fake_toolkit(tmp_path / "cuda")))
    assert build.toolkit() == ((tmp_path / "cuda").resolve(), "13.0")
    assert build.cuda_home("13.2") == (tmp_path / "cuda").resolve()


def test_toolkit_behind_a_script_on_the_path(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _fake_toolkit(tmp_path / "cuda")
    _script(tmp_path / "elsewhere" / "nvcc", f'exec "{home}/bin/nvcc" "$@"')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'elsewhere'}:{os.environ['PATH']}")
    assert build.toolkit()[0] == home.resolve()


def test_toolkit_that_does_not_fit(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(_fake_toolkit(tmp_path / "cuda", "12.8")))
    with pytest.raises(build.NotBuildableError, match=r"is 12\.8 and torch .* CUDA 13\.2"):
        build.cuda_home("13.2")
    with pytest.raises(build.NotBuildableError, match="this torch is built without CUDA"):
        build.cuda_home(None)
    _script(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")
    with pytest.raises(build.NotBuildableError, match="does not answer"):
        build.toolkit()


def test_no_toolkit(build: ModuleType, no_toolkit: None) -> None:
    with pytest.raises(build.NotBuildableError, match="there is no CUDA toolkit"):
        build.toolkit()
    assert build.with_cuda("auto", "13.2") is False
    with pytest.raises(build.NotBuildableError, match="there is no CUDA toolkit"):
        build.with_cuda("cuda", "13.2")


def test_cuda_is_built_where_there_are_sources_and_a_toolkit(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "sources", lambda suffix: [f"csrc/kernel{suffix}"])
    monkeypatch.setenv("CUDA_HOME", str(_fake_toolkit(tmp_path / "cuda")))
    # Set first, so that what the build sets is taken back after the test.
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert build.with_cuda("auto", "13.2") is True
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == build.CUDA_ARCHITECTURES
    assert build.with_cuda("cpp", "13.2") is False
    assert build.with_cuda("auto", "12.8") is False
    assert "without CUDA: the CUDA toolkit in" in capsys.readouterr().err


def test_compiler(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing-compiler"))
    with pytest.raises(build.NotBuildableError, match=r"there is no C\+\+ compiler .*missing"):
        build.compiler_flags()
    monkeypatch.setenv("CXX", str(_script(tmp_path / "broken", "echo cannot >&2; exit 1")))
    with pytest.raises(build.NotBuildableError, match="broken fails: cannot"):
        build.compiler_flags()
    without_openmp = 'for flag; do [ "$flag" = -fopenmp ] && exit 1; done; exit 0'
    monkeypatch.setenv("CXX", str(_script(tmp_path / "plain", without_openmp)))
    assert build.compiler_flags() == build.CPP_FLAGS
    monkeypatch.setenv("FASTLDM_CXXFLAGS", "-O1 -g3")
    assert build.compiler_flags() == [*build.CPP_FLAGS, "-O1", "-g3"]


def test_mode_is_checked(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLDM_BUILD", "rocm")
    with pytest.raises(SystemExit, match="FASTLDM_BUILD: got 'rocm'; accepted: auto, cpp, cuda"):
        build.extension_arguments()
    monkeypatch.setenv("FASTLDM_BUILD", "none")
    with pytest.raises(build.NotBuildableError, match="FASTLDM_BUILD=none"):
        build.extension_arguments()


def test_an_installation_without_a_compiler_goes_on(tmp_path: Path) -> None:
    folder = _copy_of_the_sources(tmp_path)
    result = _build_in_place(folder, CXX=str(tmp_path / "missing-compiler"))
    assert result.returncode == 0, result.stderr
    assert "installing without the extension: there is no C++ compiler" in result.stderr
    assert not list((folder / "fastldm").glob("*.so"))


def test_an_installation_whose_build_fails_goes_on(tmp_path: Path) -> None:
    folder = _copy_of_the_sources(tmp_path)
    compiler = _script(
        tmp_path / "compiler",
        'case "$*" in *probe.cpp*) exit 0;; *-version*|*-v) echo 12; exit 0;; esac\n'
        "echo no space left >&2; exit 1",
    )
    result = _build_in_place(folder, CXX=str(compiler))
    assert result.returncode == 0, result.stderr
    assert "the extension is not built, the operators run on the reference" in result.stderr
    assert not list((folder / "fastldm").glob("*.so"))


def test_what_is_packed_is_whole(tmp_path: Path) -> None:
    """A source distribution that builds elsewhere; a wheel with its data and configurations."""
    folder = _copy_of_the_sources(tmp_path / "sources")
    subprocess.run(
        [sys.executable, "setup.py", "sdist", "-d", "dist", "bdist_wheel", "-d", "dist"],
        cwd=folder,
        env={**os.environ, "FASTLDM_BUILD": "none"},
        capture_output=True,
        check=True,
    )
    (source,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())

    def files(name: str) -> set[str]:
        found = (path for path in (ROOT / name).rglob("*") if path.is_file())
        unwanted = (".so", ".pyc")
        return {str(path.relative_to(ROOT)) for path in found if path.suffix not in unwanted}

    assert packed >= files("csrc") | files("configs") | files("fastldm")
    assert installed >= files("fastldm")
    data = {name.partition(".data/data/share/fastldm/")[2] for name in installed}
    assert data >= files("configs")
