"""The models of each f: counted parameters, latent shapes, and what is refused."""

from __future__ import annotations

import pytest

from fastldm.errors import ConfigError
from fastldm.profiling import FACTORS, REGULARIZATIONS, LDMSpec, narrow, pairs, paper
from fastldm.profiling.specs import parameters_of

TABLE_OF = {"none": paper.TABLE_14, "class": paper.TABLE_13}


@pytest.mark.parametrize("conditioning", TABLE_OF)
@pytest.mark.parametrize("f", FACTORS)
def test_parameters_and_latents_are_the_tables(f: int, conditioning: str) -> None:
    row = next(row for row in TABLE_OF[conditioning] if row.f == f)
    spec = LDMSpec(f, "none" if f == 1 else "vq", conditioning)
    counted = parameters_of(spec.build_unet("meta")) / 1e6
    assert round(counted, 1) == row.counted_parameters
    side, channels = row.z
    assert spec.latent_shape == (channels, side, side)
    assert spec.is_papers


@pytest.mark.parametrize(("f", "regularization"), list(pairs(FACTORS[1:], REGULARIZATIONS)))
def test_first_stages_go_from_images_to_the_latents_of_the_unet(
    f: int, regularization: str
) -> None:
    spec = narrow(f, regularization, image_size=64 * f if f > 8 else 128)
    first_stage = spec.build_first_stage("meta")
    assert first_stage is not None
    assert first_stage.downsampling_factor == f
    assert first_stage.latent_channels == spec.latent_channels == spec.unet_config()["in_channels"]
    if regularization == "kl":
        assert spec.latent_channels == paper.first_stage_row("kl", f).latent_channels
    else:
        assert first_stage.quantize.num_embeddings == spec.row.num_embeddings


@pytest.mark.parametrize(
    ("f", "regularization", "millions"),
    [(4, "kl", 55.31), (8, "kl", 83.65), (16, "kl", 69.61), (32, "kl", 103.88), (4, "vq", 55.32),
     (8, "vq", 67.72), (16, "vq", 69.59)],
)  # fmt: skip
def test_published_first_stages_have_their_parameters(
    f: int, regularization: str, millions: float
) -> None:
    first_stage = LDMSpec(f, regularization).build_first_stage("meta")
    assert parameters_of(first_stage) / 1e6 == pytest.approx(millions, abs=0.006)


def test_pixels_have_no_first_stage() -> None:
    spec = LDMSpec(1, "none")
    assert spec.build_first_stage() is None
    assert spec.latent_shape == (3, 256, 256)
    assert spec.name == "f=1 pixels"
    assert list(pairs((1, 4), REGULARIZATIONS)) == [(1, "none"), (4, "kl"), (4, "vq")]


def test_narrow_models_are_not_the_papers() -> None:
    spec = narrow(4, "kl")
    assert not spec.is_papers
    assert not LDMSpec(4, "kl", image_size=512).is_papers
    assert spec.latent_shape == LDMSpec(4, "kl").latent_shape
    assert parameters_of(spec.build_unet("meta")) < 0.05 * parameters_of(
        LDMSpec(4, "kl").build_unet("meta")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": 3, "regularization": "kl"}, "f: got 3; accepted: 1, 2, 4, 8, 16, 32"),
        ({"f": 4, "regularization": "none"}, "regularization: got 'none' for f = 4; .*'kl', 'vq'"),
        ({"f": 1, "regularization": "vq"}, "regularization: got 'vq' for f = 1; accepted: 'none'"),
        ({"f": 4, "regularization": "kl", "conditioning": "text"}, "conditioning: got 'text'"),
        ({"f": 4, "regularization": "kl", "image_size": 100}, "image_size: got 100.*of 32"),
        ({"f": 4, "regularization": "kl", "base_channels": 20}, "base_channels: got 20"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LDMSpec(**arguments)  # type: ignore[arg-type]
