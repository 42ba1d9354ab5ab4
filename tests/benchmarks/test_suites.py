"""The suites are collected, and what they measure is named, checked, stored and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.contestants import (
    COMPILED,
    EAGER,
    FASTLDM,
    FASTLDM_COMPILED,
    Results,
    assert_agreement,
    contestants,
)
from benchmarks.gpu.records import ROOT
from fastldm import ops

SMALL = "benchmarks/test_cross_attention.py::test_forward[(2, 64, 4, 24, 24)]"


def _pytest(*arguments: str) -> str:
    # In a worker of pytest-xdist, pytest-benchmark stores nothing.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=ROOT, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_each_contestant_is_a_benchmark_that_later_runs_know_again(tmp_path: Path) -> None:
    stored, times = tmp_path / "0001.json", tmp_path / "times.json"
    _pytest(SMALL, f"--benchmark-json={stored}", f"--results={times}")
    content = json.loads(stored.read_text())
    found = content["benchmarks"]
    names = [f"{SMALL[:-1]}-{name}]" for name in ("fastldm", "sdpa")]
    assert [benchmark["fullname"] for benchmark in found] == names
    assert {benchmark["group"] for benchmark in found} == {SMALL.removeprefix("benchmarks/")}
    assert [benchmark["params"]["contestant"] for benchmark in found] == ["fastldm", "sdpa"]
    assert all(benchmark["extra_info"]["peak_bytes"] > 0 for benchmark in found)
    assert content["machine_info"]["fastldm"]["torch"] == torch.__version__

    written = json.loads(times.read_text())
    assert 0 <= written["disturbance"][SMALL] <= 1
    kept = written["benchmarks"][SMALL]
    for benchmark, name in zip(found, ("fastldm", "sdpa"), strict=True):
        assert benchmark["stats"]["median"] * 1e6 == pytest.approx(kept[name]["median"], rel=1e-3)

    table = _pytest(
        SMALL, f"--benchmark-compare={stored}", "--benchmark-group-by=param:contestant",
        "--benchmark-columns=median",
    )  # fmt: skip
    assert "contestant=sdpa" in table.replace("'", "")
    assert table.count("(NOW)") == 2
    assert table.count("0001)") == 2
    assert "machine_info is different" not in table


def test_all_suites_are_collected() -> None:
    listed = _pytest("benchmarks", "--collect-only")
    for suite in (
        "group_norm_silu", "cross_attention", "diffusion_step", "vector_quantize", "blocks",
        "autoencoders", "unets", "samplers", "training_steps", "latent_against_pixel",
    ):  # fmt: skip
        assert f"benchmarks/test_{suite}.py" in listed


def test_contestants_share_weights_and_agree() -> None:
    network, x = nn.Linear(3, 3), torch.randn(2, 3)
    calls = contestants(network, lambda network: (network(x),), (EAGER,), lambda: network)
    assert list(calls) == [FASTLDM, EAGER]
    expected = (network(x),)
    assert_agreement(calls, expected)
    with pytest.raises(AssertionError, match="eager differs from plain torch by 1"):
        assert_agreement({"eager": lambda: (2 * expected[0],)}, expected)


def test_compiled_contestants_differ_in_whose_kernels_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    network, x = nn.Linear(4, 4), torch.randn(2, 4)
    asked: list[str] = []

    def work(network: nn.Module) -> Results:
        asked.append(ops.explain("geglu", x).partition("asked for: ")[2].partition(")")[0])
        return (network(x),)

    peers = (FASTLDM_COMPILED, COMPILED)
    calls = contestants(network, work, peers, lambda: network)
    assert list(calls) == [FASTLDM, *peers]
    asked.clear()
    for call in calls.values():
        call()
    assert asked == ["auto", "auto", "reference"]
