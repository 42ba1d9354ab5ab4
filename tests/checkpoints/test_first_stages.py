"""First stages from CompVis's layout: the restated original's numbers, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastldm.checkpoints import compvis_state_dict
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import AutoencoderKL, VQModel
from tests.checkpoints.original import Weights, decode, encode, quantize

CODER: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def kl(embed_dim: int = 4, **coder: Any) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "ddconfig": {**CODER, **coder}}


def vq(embed_dim: int = 4, **coder: Any) -> dict[str, Any]:
    return {**kl(embed_dim, double_z=False, **coder), "n_embed": 16}


MODELS: dict[str, dict[str, Any]] = {
    "kl": kl(),
    "kl, attention at a level": kl(attn_resolutions=[8], num_res_blocks=2),
    "kl, attention at all levels": kl(attn_resolutions=[16, 8, 4], ch_mult=[1, 1, 2]),
    "kl, linear attention": kl(attn_type="linear", attn_resolutions=[8]),
    "kl, no convolution in resampling": kl(resamp_with_conv=False),
    "kl, narrower latents": kl(embed_dim=2),
    "kl, one level": kl(ch_mult=[1]),
    "kl, tanh": kl(tanh_out=True),
    "vq": vq(),
    "vq, no attention": vq(attn_type="none", attn_resolutions=[8]),
    "vq, attention at a level": vq(attn_resolutions=[8]),
    "vq, wider codes": vq(embed_dim=6),
}


def kind_of(params: dict[str, Any]) -> type[AutoencoderKL | VQModel]:
    return VQModel if "n_embed" in params else AutoencoderKL


def yaml_of(params: dict[str, Any]) -> dict[str, Any]:
    target = "VQModelInterface" if "n_embed" in params else "AutoencoderKL"
    beside = {"monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"}}
    return {"model": {"target": f"ldm.models.autoencoder.{target}", "params": params | beside}}


def make(params: dict[str, Any]) -> tuple[Weights, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, an image, what the encoder gives for it, and the image of its latents."""
    weights = Weights()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    encoded = encode(weights, params, image)
    z = encoded[:, : params["embed_dim"]]
    z = quantize(weights, params, z) if "n_embed" in params else z
    return weights, image, encoded, decode(weights, params, z)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_numbers_are_the_original_s_and_every_bit_comes_back(name: str) -> None:
    params = MODELS[name]
    weights, image, encoded, decoded = make(params)
    model = kind_of(params).from_single_file(
        weights, config=yaml_of(params), torch_dtype=torch.float64
    )
    if isinstance(model, VQModel):
        latents = model.encode(image).latents
        assert error(latents, encoded) < 1e-12
        assert error(model.decode(latents).sample, decoded) < 1e-12
    else:
        posterior = model.encode(image).latent_dist
        mean, logvar = encoded.chunk(2, dim=1)
        assert error(posterior.mean, mean) < 1e-12
        assert error(posterior.logvar, logvar.clamp(-30, 20)) < 1e-12
        assert error(model.decode(mean).sample, decoded) < 1e-12
    back = compvis_state_dict(model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_tell_the_architecture(name: str) -> None:
    params = MODELS[name]
    weights = make(params)[0]
    stated = kind_of(params).from_single_file(weights, config=yaml_of(params))
    inferred = kind_of(params).from_single_file(weights, sample_size=16)
    untold = {
        # Nothing in the file says it.
        "output_activation": stated.config["output_activation"],
        "scaling_factor": stated.config["scaling_factor"],
    }
    if name == "kl, one level":
        untold["resample_with_conv"] = True
    assert {**inferred.config, **untold} == stated.config


def test_a_discriminator_and_averages_in_the_file_are_left_out() -> None:
    params = MODELS["vq"]
    weights = make(params)[0]
    training = {
        "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.encoderconv_inweight": torch.zeros(32, 3, 3, 3),
    }
    model = VQModel.from_single_file({**weights, **training}, config=yaml_of(params))
    alone = VQModel.from_single_file(weights, config=yaml_of(params))
    assert all(
        torch.equal(value, alone.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_the_scaling_factor_is_the_file_s_the_config_s_or_the_usual_one() -> None:
    weights = make(MODELS["kl"])[0]
    whole = {f"first_stage_model.{name}": value for name, value in weights.items()}
    stage = yaml_of(MODELS["kl"])["model"]
    ldm = {"unet_config": {"params": UNET}, "first_stage_config": stage}

    def factor(tensors: dict[str, Any], **diffusion: Any) -> float:
        config = {"params": ldm | diffusion} if diffusion else None
        return AutoencoderKL.from_single_file(tensors, config=config).config["scaling_factor"]

    buffer = {"scale_factor": torch.tensor(0.25)}
    assert factor(whole) == 0.18215
    assert factor(whole | buffer) == 0.25
    assert factor(whole | buffer, scale_by_std=True) == 0.25
    assert factor(whole | buffer, scale_factor=0.5) == 0.5
    assert factor(whole, timesteps=1000) == 1.0
    codes = make(MODELS["vq"])[0]
    assert VQModel.from_single_file(codes).config["scaling_factor"] == 1.0
    for value in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(CheckpointError, match="scale_factor"):
            factor(whole | {"scale_factor": value})


UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "num_heads": 1,
}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (kl(double_z=False), "double_z: False does not go with AutoencoderKL"),
        (vq() | {"ddconfig": CODER}, "double_z: True does not go with VQModel"),
        (kl(give_pre_end=True), "give_pre_end"),
        (kl(attn_type="gated"), "attn_type: .* 'gated'"),
        (kl(ch_mult=[2, 2]), "ch_mult: .* 1 for the first level"),
        (kl(ch_mult=[1, -1]), "ch_mult: expected positive"),
        (kl(depth=3), "ddconfig: fastldm does not know 'depth'"),
        (kl() | {"remap": "used.npy"}, "remap: AutoencoderKL has no codebook"),
        (kl() | {"colour": 1}, "does not know 'colour'"),
        (kl() | {"embed_dim": "4"}, "embed_dim: expected an integer, got '4'"),
        ({"ddconfig": CODER}, "embed_dim: missing"),
        ({"embed_dim": 4, "ddconfig": [1]}, "ddconfig: expected a mapping, got a list of 1"),
    ],
)
def test_config_errors_name_the_argument(params: dict[str, Any], message: str) -> None:
    kind = kind_of(params)
    weights = make(MODELS["vq" if kind is VQModel else "kl"])[0]
    with pytest.raises(ConfigError, match=message):
        kind.from_single_file(weights, config=yaml_of(params))


def test_weights_of_another_first_stage_are_refused() -> None:
    continuous, discrete = make(MODELS["kl"])[0], make(MODELS["vq"])[0]
    with pytest.raises(CheckpointError, match="those of VQModel, not AutoencoderKL"):
        AutoencoderKL.from_single_file(discrete)
    with pytest.raises(CheckpointError, match=r"missing .*attn\.0"):
        config = yaml_of(kl(attn_resolutions=[8]))
        AutoencoderKL.from_single_file(continuous, config=config)
    with pytest.raises(CheckpointError, match="a first stage with at least"):
        AutoencoderKL.from_single_file(continuous, config=yaml_of(kl(num_res_blocks=10**9)))
    with pytest.raises(CheckpointError, match=r"none of CompVis's.*decoder\.conv_out\.weight"):
        cut = {name: value for name, value in continuous.items() if "decoder.conv_out" not in name}
        AutoencoderKL.from_single_file(cut)


def test_a_first_stage_without_quant_convolutions_is_told() -> None:
    weights = make(MODELS["kl"])[0]
    bare = {name: value for name, value in weights.items() if "quant_conv" not in name}
    model = AutoencoderKL.from_single_file(bare)
    assert not model.config["use_quant_conv"]
    assert compvis_state_dict(model).keys() == bare.keys()


def test_moving_averages_of_the_codebook_start_from_the_codes() -> None:
    weights = make(MODELS["vq"])[0]
    model = VQModel.from_single_file(weights, codebook_ema_decay=0.99)
    assert torch.equal(model.quantize.ema_sums, model.quantize.embedding.weight)
    assert torch.equal(model.quantize.ema_counts, torch.ones(16))
    assert compvis_state_dict(model).keys() == weights.keys()


def test_a_remapped_codebook_goes_through_whole() -> None:
    weights = make(MODELS["vq"])[0] | {"quantize.used": torch.tensor([9, 2, 15])}
    for config in (None, yaml_of(vq() | {"remap": "used.npy"})):
        model = VQModel.from_single_file(weights, config=config, torch_dtype=torch.float16)
        assert model.config["num_used_embeddings"] == 3
        assert model.quantize.num_indices == 3
        assert model.quantize.used.tolist() == [9, 2, 15]
        assert torch.equal(compvis_state_dict(model)["quantize.used"], weights["quantize.used"])
    with pytest.raises(CheckpointError, match=r"remap: the file has no quantize\.used"):
        plain = make(MODELS["vq"])[0]
        VQModel.from_single_file(plain, config=yaml_of(vq() | {"remap": "used.npy"}))
    for bad, message in (
        (torch.tensor([9, 16]), r"quantize\.used: .* from 0 to 15, got 9 to 16"),
        (torch.tensor([[9]]), "quantize.used"),
        (torch.tensor([9.0]), "torch.float32, not whole numbers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            VQModel.from_single_file(weights | {"quantize.used": bad})


def test_a_first_stage_that_the_layout_cannot_hold_is_refused() -> None:
    model = VQModel(block_out_channels=(32,), norm_type="spatial", latent_channels=4)
    with pytest.raises(ConfigError, match="norm_type='spatial'"):
        compvis_state_dict(model)
