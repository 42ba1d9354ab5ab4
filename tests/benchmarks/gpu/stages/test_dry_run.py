"""Every stage that measures runs to its end at sizes that take no time, and its results are right.

What runs here in Triton's interpreter is what runs on a GPU, but for the timing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import records, report, worker
from benchmarks.gpu.contest import COPY, OURS
from benchmarks.gpu.records import DONE, FAILED, Record, Row
from benchmarks.gpu.stages import Context, models, roofs, tuning

Run = Callable[[str], Record]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def call(stage: str) -> Record:
        status = worker.run_stage(stage, Context("cpu", tmp_path, 60.0))
        record = records.read(tmp_path, stage)
        assert record is not None
        assert status == (0 if record.state == DONE else 1)
        return record

    return call


@pytest.mark.parametrize(
    "stage", ["group_norm_silu", "cross_attention", "diffusion_step", "vector_quantize", "geglu"]
)
def test_contests(stage: str, run: Run) -> None:
    record = run(stage)
    assert (record.state, record.problems) == (DONE, [])
    assert record.stamp["device"] == "CPU (dry run)"
    assert any(row["is_target"] for row in record.rows)
    for row in record.rows:
        assert {OURS} < set(row["cold_us"])
        assert row["bytes"] > 0
        assert (COPY in row["cold_us"]) == (stage not in ("cross_attention", "vector_quantize"))


def test_winners(run: Run, tmp_path: Path) -> None:
    record = run("winners")
    assert (record.state, record.problems) == (DONE, [])
    table = json.loads((tmp_path / "cross_attention_winners.json").read_text())
    # Nothing is slower than the interpreter.
    assert table["default"] == [
        {"dtypes": ["float32"], "queries": [1, 8], "keys": [1, 5], "channels": [1, 16]}
    ]


def test_tuning(run: Run, tmp_path: Path) -> None:
    record = run("tuning")
    assert record.state == DONE
    assert [row["candidate"]["num_warps"] for row in record.rows] == [8]
    assert len(record.rows[0]["ratios"]) == 2
    assert (tmp_path / "group_norm_silu_plan.json").exists()
    assert tuning.KERNELS[0][0] == record.rows[0]["kernel"]


def test_attention_tuning(run: Run, tmp_path: Path) -> None:
    record = run("attention_tuning")
    assert record.state == DONE
    assert [row["direction"] for row in record.rows] == ["forward", "backward"]
    assert all(len(row["ratios"]) == 2 for row in record.rows)
    faster = json.loads((tmp_path / "cross_attention_plans.json").read_text())
    kept = [row["candidate"] for row in record.rows if row["kept"]]
    assert [found["changes"] for found in faster] == kept


def test_roofs_and_environment(run: Run) -> None:
    found = [row["what"] for row in run("roofs").rows]
    assert found == ["copy"] + ["matrix product"] * len(roofs._DTYPES)
    rows = {row["what"]: row for row in run("environment").rows}
    assert rows["fastldm.env"]["operators"]
    assert rows["package pytest"]["version"] == pytest.__version__


def test_models(run: Run) -> None:
    record = run("models")
    assert (record.state, record.problems) == (DONE, [])
    assert [row["backend"] for row in record.rows] == ["plain torch", "fastldm"] * len(
        models.MODELS
    )
    for row in record.rows:
        assert row["families_us"]["convolution"] > 0
        assert row["what"].endswith("(dry run)")


def test_throughput(run: Run, tmp_path: Path) -> None:
    record = run("throughput")
    assert (record.state, record.problems) == (DONE, [])
    found = [(row["f"], row["what"], row["backend"]) for row in record.rows]
    assert found == [
        (f, what, backend)
        for f in (4, 1)
        for what in ("sample", "train")
        for backend in ("plain torch", "fastldm")
    ]
    for row in record.rows:
        assert row["peak_bytes"] > 0
        per_image = row["step_ms"] / 1e3
        if row["what"] == "sample":
            assert (row["decode_ms"] > 0) == (row["f"] == 4)
            per_image = per_image * row["steps"] + row["decode_ms"] / 1e3
        assert row["images_per_second"] == pytest.approx(1 / per_image)
    page = report.page(tmp_path)
    assert page.count("| f=4 VQ | 64² |") == page.count("| f=1 pixels | 64² |") == 4
    faster = record.rows[1]["images_per_second"] / record.rows[5]["images_per_second"]
    assert f"| {faster:.2f} |" in page


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("_group_norm_silu_fwd_apply_kernel", "GroupNorm + SiLU, ours"),
        ("_cross_attention_fwd_kernel", "cross-attention, ours"),
        ("_geglu_fwd_kernel", "GEGLU, ours"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_bias_TNN", "matrix product"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::Half>", "normalisation"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "elementwise"),
        ("something new", "other"),
    ],
)
def test_families(name: str, family: str) -> None:
    assert models.family_of(name) == family


def test_a_stage_that_fails_keeps_its_rows(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Context) -> Iterator[Row]:
        yield {"what": "copy"}
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(roofs, "run", broken)
    record = run("roofs")
    assert (record.state, record.reason) == (FAILED, "RuntimeError: the device is gone")
    assert record.rows == [{"what": "copy"}]
    assert "Traceback" in capsys.readouterr().err
