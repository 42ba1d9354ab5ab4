"""``fastldm study``: a small study from the command line, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Run = Callable[..., str]

STUDY = """
kl: [2]
vq: []
budget_tflop: 0.0005
points: 1
first_stage: {base_channels: 4, norm_num_groups: 2, batch_size: 4, kl_channels: {2: 2}}
diffusion:
  block_out_channels: {1: [4, 4], 2: [4, 4]}
  layers_per_block: 1
  batch_size: 4
  attention_sides: []
  norm_num_groups: 2
evaluation:
  {samples: 2, num_inference_steps: 1, features: random_conv, bound_images: 1, bound_groups: 1}
cpu: true
progress_bar: false
"""


def test_a_study_from_a_file_and_options(run: Run, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    options = (
        "study", "--config", path, "--data.source", images, "--data.resolution", 16,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    shown = run(*options)
    assert shown.strip() == str(tmp_path / "out" / "report.md")
    assert "| kl-f2 |" in Path(shown.strip()).read_text()
    # A cell more on the same folder; what is there stays as it is.
    before = (tmp_path / "out" / "cells" / "kl-f2" / "cell.json").stat().st_mtime_ns
    error = run(*options, "--kl", "[2,3]", status=2)
    assert error == "fastldm study: error: kl: f must be one of 2, 4, 8, 16, 32, got 3\n"
    error = run(*options, "--seed", 3, status=2)
    assert "holds a study with another seed" in error
    error = run(*options, "--evaluation.features", "vgg16", status=2)
    assert "another evaluation" in error
    assert (tmp_path / "out" / "cells" / "kl-f2" / "cell.json").stat().st_mtime_ns == before


def test_features_without_weights(run: Run, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    error = run(
        "study", "--config", path, "--data.source", images, "--data.resolution", 16,
        "--output_dir", tmp_path / "out", "--evaluation.features", "vgg16", status=2,
    )  # fmt: skip
    assert "'vgg16' needs a local file of its weights as evaluation.features_weights" in error
    assert not (tmp_path / "out" / "cells").exists()
