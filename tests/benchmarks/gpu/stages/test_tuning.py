"""Candidates reach the kernels' plans, and are gone afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.stages import tuning
from fastldm.ops.group_norm_silu import plan

SIZES = plan.Sizes(1, 128, 4096, 32, True, 2)


def test_plans_of_a_candidate() -> None:
    before = plan.split("apply", "default", SIZES)
    config = {**plan._configs("default")["apply"], "num_warps": 16, "block_c": 64}
    with tuning.planned({"apply": config}):
        changed = plan.split("apply", "default", SIZES)
        assert (changed.num_warps, changed.block_c) == (16, 64)
        assert plan.split("moments", "default", SIZES).num_warps == 4
    assert plan.split("apply", "default", SIZES) == before


def test_what_is_kept_is_what_the_plan_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    config = {**plan._configs("default")["apply"], "num_warps": 16}
    tuning._write(path, "sm_90", {"apply": config})
    stored = Path(plan.__file__).with_name("plan.json").read_text(encoding="utf-8")
    assert json.loads(path.read_text())["default"] == json.loads(stored)["default"]
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "plan.py"))
    plan._configs.cache_clear()
    try:
        assert plan._configs("sm_90")["apply"]["num_warps"] == 16
        assert plan._configs("sm_90")["moments"] == plan._configs("default")["moments"]
    finally:
        plan._configs.cache_clear()


def test_nothing_found_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    tuning._write(path, "sm_90", {})
    stored = Path(plan.__file__).with_name("plan.json").read_text(encoding="utf-8")
    assert path.read_text() == stored


@pytest.mark.parametrize("kernel", [kernel for kernel, *_ in tuning.KERNELS])
def test_every_kernel_of_the_plan_has_candidates(kernel: str) -> None:
    base = plan._configs("default")[kernel]
    assert set(base) <= set(tuning.CANDIDATES)
    assert {name for name, *_ in tuning.KERNELS} == set(plan._configs("default"))
