"""The tables of docs/coming_from_diffusers.md say what is so."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import diffusers
import pytest

import fastldm
from fastldm.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming_from_diffusers.md").read_text(encoding="utf-8")


def table(first_header: str) -> list[list[str]]:
    """The rows of the table whose first column has that header, cell by cell."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_models_and_their_further_fields() -> None:
    rows = table("diffusers")
    assert len(rows) == 4
    for theirs, ours, fields in rows:
        model = getattr(fastldm, code(ours)[0])
        assert inspect.isclass(getattr(diffusers, code(theirs)[0]))
        assert set(code(fields)) == model.extension_fields


@pytest.mark.parametrize("row", table("field"), ids=lambda row: code(row[0])[0])
def test_refused_values(row: list[str]) -> None:
    field, value = code(row[0])[0], json.loads(code(row[1])[0])
    config = {field: value}
    if field == "encoder_hid_dim_type":
        config["encoder_hid_dim"] = 4
    assert field in inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    with pytest.raises(ConfigError, match=field):
        fastldm.UNet2DConditionModel.from_config(config)


def test_keywords_of_loading(tmp_path: Path) -> None:
    model = fastldm.UNet2DModel(
        block_out_channels=[4],
        norm_num_groups=4,
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        attention_head_dim=4,
        layers_per_block=1,
    )
    model.save_pretrained(tmp_path)
    accepted = inspect.signature(fastldm.UNet2DModel.from_pretrained).parameters
    for keyword, here in table("keyword of `from_pretrained`"):
        name = code(keyword)[0]
        if here.startswith("refused"):
            fastldm.UNet2DModel.from_pretrained(tmp_path, **{name: None})
            with pytest.raises(ConfigError, match=name):
                fastldm.UNet2DModel.from_pretrained(tmp_path, **{name: True})
        else:
            assert name in accepted
    written = set(inspect.signature(model.save_pretrained).parameters) - {"save_directory"}
    assert written == {"max_shard_size", "variant", "safe_serialization"}
    assert all(f"`{name}`" in PAGE for name in written)


def test_pipelines_are_those_of_the_tests() -> None:
    listed = {code(row[0])[0] for row in table("pipeline")}
    tested = set()
    for name in ("test_pipelines.py", "test_adapters.py"):
        source = (Path(__file__).parent / name).read_text(encoding="utf-8")
        tested |= set(re.findall(r"diffusers\.(\w+Pipeline)\b", source))
    assert listed == tested | {"DDPMPipeline", "DDIMPipeline"}
    assert all(inspect.isclass(getattr(diffusers, name)) for name in listed)


def test_methods_are_there() -> None:
    for theirs, _ in table("in diffusers"):
        model, method = code(theirs)[0].split(".")
        assert hasattr(getattr(diffusers, model), method)
    unet = fastldm.UNet2DConditionModel(
        block_out_channels=[8],
        norm_num_groups=4,
        down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"],
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    vae = fastldm.AutoencoderKL(block_out_channels=[4], norm_num_groups=4)
    for theirs, _ in table("in diffusers"):
        model, method = code(theirs)[0].split(".")
        assert hasattr(unet if model == "UNet2DConditionModel" else vae, method)
