"""CompVis's first-stage losses: those of the published models, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastldm.checkpoints import read_first_stage_loss
from fastldm.errors import CheckpointError, ConfigError
from fastldm.losses import FirstStageLossConfig
from fastldm.models import PatchDiscriminator
from tests.checkpoints.conftest import FACTS

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted(name for name in FACTS["models"] if name.startswith("first_stage/"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_trained_as_our_configs_say(name: str, tmp_path: Path) -> None:
    published = FACTS["models"][name]["config"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": published}))
    found = read_first_stage_loss(path)
    assert read_first_stage_loss(published["params"]["lossconfig"]) == found
    file = ROOT / "configs" / "autoencoders" / f"{name.removeprefix('first_stage/')}.yaml"
    ours = yaml.safe_load(file.read_text())
    assert asdict(found.loss) == asdict(FirstStageLossConfig(**ours["loss"]))
    config = PatchDiscriminator(**found.discriminator).config
    assert config == PatchDiscriminator(**ours["discriminator"]["config"]).config


def lossconfig(kind: str, **params: Any) -> dict[str, Any]:
    target = f"ldm.modules.losses.{kind}LPIPSWithDiscriminator"
    return {"target": target, "params": {"disc_start": 7, **params}}


def test_every_argument_arrives() -> None:
    kl = read_first_stage_loss(
        lossconfig(
            "", logvar_init=0.3, kl_weight=2e-5, pixelloss_weight=3.0, disc_num_layers=4,
            disc_in_channels=5, disc_factor=0.9, disc_weight=0.8, perceptual_weight=0.7,
            use_actnorm=True, disc_loss="vanilla",
        )
    )  # fmt: skip
    assert kl.loss == FirstStageLossConfig(
        reduction="sum_per_sample",
        generator_loss="linear",
        logvar_init=0.3,
        kl_weight=2e-5,
        discriminator_start=7,
        discriminator_factor=0.9,
        discriminator_weight=0.8,
        perceptual_weight=0.7,
        adversarial_loss="vanilla",
    )
    assert kl.discriminator == {
        "in_channels": 5,
        "base_channels": 64,
        "num_layers": 4,
        "normalization": "actnorm",
    }
    vq = read_first_stage_loss(
        lossconfig("VQ", codebook_weight=0.4, disc_ndf=32, pixel_loss="l2", n_classes=8)
    )
    assert vq.loss == FirstStageLossConfig(
        reduction="mean",
        generator_loss="linear",
        legacy=True,
        reconstruction="l2",
        codebook_weight=0.4,
        discriminator_start=7,
        discriminator_weight=1.0,
    )
    assert vq.discriminator["base_channels"] == 32
    # Without arguments the original's defaults hold, not those of the published models.
    plain = read_first_stage_loss(lossconfig("")).loss
    assert (plain.kl_weight, plain.discriminator_weight) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target": "torch.nn.Identity"},
            "target: expected LPIPSWithDiscriminator or VQ.*Identity",
        ),
        ({}, "target: expected LPIPSWithDiscriminator"),
        ({"model": {"params": {"lossconfig": 3}}}, "lossconfig: expected a mapping, got 3"),
        (lossconfig("", disc_conditional=True), "disc_conditional"),
        (lossconfig("", disc_start="soon"), "disc_start: expected an integer, got 'soon'"),
        (lossconfig("", disc_loss="wasserstein"), "adversarial_loss: expected one of hinge"),
        (lossconfig("", codebook_weight=1.0), "does not know 'codebook_weight'"),
        (lossconfig("VQ", perceptual_loss="l3"), "perceptual_loss: expected 'lpips', got 'l3'"),
        (lossconfig("VQ", pixel_loss="l3"), "pixel_loss: expected 'l1' or 'l2', got 'l3'"),
    ],
)
def test_what_ours_has_not_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_first_stage_loss(config)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        read_first_stage_loss(tmp_path / "gone.yaml")
