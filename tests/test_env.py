"""What ``python -m fastldm.env`` says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastldm
from fastldm import env, ops
from fastldm.ops import _extension


def test_collect() -> None:
    found = env.collect()
    assert found["fastldm"] == fastldm.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"].keys() >= {"cpu"}
    assert found["extension"]["usable"] == (_extension.problem() is None)
    assert set(found["operators"]) == set(ops.OPERATORS)
    for name, by_device in found["operators"].items():
        assert set(by_device) == set(found["devices"])
        for service in by_device.values():
            assert {service["served_by"], *service["reasons"]} <= set(ops.BACKENDS)
            assert service["served_by"] not in service["reasons"], name


def test_the_module_prints_the_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastldm.env"], capture_output=True, text=True, check=True
    )
    assert f"torch: {torch.__version__}" in result.stdout
    assert "device cpu: " in result.stdout
    served_by = "reference" if _extension.problem() else "cpp"
    assert f"cross_attention on cpu: {served_by}" in result.stdout
    state = "extension: not used" if _extension.problem() else "extension: built for torch"
    assert state in result.stdout


def test_an_unusable_extension_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_extension, "_load", lambda: (None, "it is broken"))
    assert env.main() == 0
    printed = capsys.readouterr().out
    assert "extension: not used: it is broken" in printed
    assert "vector_quantize on cpu: reference" in printed
    assert "    not cpp: no extension, see above" in printed
    assert printed.count("it is broken") == 1


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package: not installed" in env.report()
