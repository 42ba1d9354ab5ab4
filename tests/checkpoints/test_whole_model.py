"""Whole models from one file, and back: every bit of it, as CompVis wrote it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from torch import Tensor

from fastldm import (
    ClassEmbedder,
    DDIMScheduler,
    LatentDiffusion,
    SpatialRescaler,
    TextEncoder,
)
from fastldm.checkpoints import read_tensors, write_single_file
from fastldm.errors import CheckpointError, ConfigError
from tests.checkpoints.original import (
    Weights,
    bert,
    decode,
    encode,
    quantize,
    rescale,
    schedule,
    unet,
)

CODER = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
VQ = {"target": "VQModelInterface", "params": {"embed_dim": 3, "n_embed": 8, "ddconfig": CODER}}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 3, "ddconfig": {**CODER, "double_z": True, "attn_resolutions": [8]}},
}
VQ["target"] = "ldm.models.autoencoder.VQModelInterface"
UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
}
CROSS = {**UNET, "use_spatial_transformer": True, "context_dim": 24}
ENCODERS = "ldm.modules.encoders.modules"
BERT = {"n_embed": 24, "n_layer": 1, "vocab_size": 11, "max_seq_len": 7}
RESCALER = {"n_stages": 1, "in_channels": 5, "out_channels": 2}

MODELS: dict[str, dict[str, Any]] = {
    "none": {"unet": UNET, "first_stage": VQ, "cond": "__is_unconditional__", "ema": True},
    "none, scale by std": {
        "unet": {**UNET, "resblock_updown": True, "use_scale_shift_norm": True},
        "first_stage": KL,
        "cond": "__is_unconditional__",
        "ema": True,
        "scale_by_std": True,
    },
    "class": {
        "unet": CROSS,
        "first_stage": VQ,
        "cond": {
            "target": f"{ENCODERS}.ClassEmbedder",
            "params": {"embed_dim": 24, "n_classes": 6, "key": "class_label"},
        },
        "ema": True,
        "conditioning_key": "crossattn",
    },
    "text": {
        "unet": CROSS,
        "first_stage": KL,
        "cond": {"target": f"{ENCODERS}.BERTEmbedder", "params": BERT},
        "ema": False,
        "conditioning_key": "crossattn",
        "scale_factor": 0.18215,
    },
    "context": {
        "unet": CROSS,
        "first_stage": KL,
        "cond": {"target": "torch.nn.Identity"},
        "ema": True,
        "conditioning_key": "crossattn",
    },
    "concat": {
        "unet": {**UNET, "in_channels": 5},
        "first_stage": VQ,
        "cond": {"target": f"{ENCODERS}.SpatialRescaler", "params": RESCALER},
        "ema": True,
    },
    "inpainting": {
        "unet": {**UNET, "in_channels": 7},
        "first_stage": VQ,
        "cond": "__is_first_stage__",
        "ema": True,
    },
    "hybrid": {
        "unet": {**CROSS, "in_channels": 5},
        "first_stage": KL,
        "cond": {"target": "torch.nn.Identity"},
        "ema": False,
        "conditioning_key": "hybrid",
    },
    "adm": {
        "unet": {**UNET, "num_classes": 6},
        "first_stage": VQ,
        "cond": {"target": "torch.nn.Identity"},
        "ema": True,
        "conditioning_key": "adm",
    },
    "new order": {
        "unet": {**UNET, "use_new_attention_order": True},
        "first_stage": VQ,
        "cond": "__is_unconditional__",
        "ema": True,
    },
    "learned log-variance": {
        "unet": UNET,
        "first_stage": VQ,
        "cond": "__is_unconditional__",
        "ema": True,
        "learn_logvar": True,
    },
}


def config_of(model: dict[str, Any]) -> dict[str, Any]:
    given = ("conditioning_key", "scale_factor", "scale_by_std", "learn_logvar")
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0205,
        "timesteps": 1000,
        "loss_type": "l1",
        "first_stage_key": "image",
        "image_size": 8,
        "channels": 3,
        "monitor": "val/loss",
        "use_ema": model["ema"],
        "unet_config": {"target": "ldm.modules.UNetModel", "params": model["unet"]},
        "first_stage_config": model["first_stage"],
        "cond_stage_config": model["cond"],
        **{name: model[name] for name in given if name in model},
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"model": {"base_learning_rate": 1e-6, "target": target, "params": params}}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@torch.no_grad()
def make(name: str) -> dict[str, Tensor]:
    """The tensors of such a file in float32, the UNet's averages other than its weights."""
    model = MODELS[name]
    params = model["first_stage"]["params"]
    parts = {"model.diffusion_model.": Weights(1), "first_stage_model.": Weights(2)}
    unet_inputs = {"x": normal(1, model["unet"]["in_channels"], 8, 8), "t": torch.tensor([3])}
    if "context_dim" in model["unet"]:
        unet_inputs["context"] = normal(1, 2, 24)
    if "num_classes" in model["unet"]:
        unet_inputs["y"] = torch.tensor([2])
    unet(parts["model.diffusion_model."], model["unet"], **unet_inputs)
    averages = Weights(3)
    unet(averages, model["unet"], **unet_inputs)
    stage = parts["first_stage_model."]
    latents = encode(stage, params, normal(1, 3, 16, 16))[:, :3]
    decode(stage, params, quantize(stage, params, latents) if "n_embed" in params else latents)
    if name == "inpainting":
        parts["cond_stage_model."] = stage
    elif name == "class":
        parts["cond_stage_model."] = Weights(4)
        parts["cond_stage_model."]("embedding.weight", 6, 24)
    elif name == "text":
        parts["cond_stage_model."] = Weights(4)
        bert(parts["cond_stage_model."], BERT, torch.zeros(1, 3, dtype=torch.int64))
    elif name == "concat":
        parts["cond_stage_model."] = Weights(4)
        rescale(parts["cond_stage_model."], RESCALER, normal(1, 5, 8, 8))
    tensors = schedule(0.0015, 0.0205)
    if model.get("scale_by_std"):
        tensors["scale_factor"] = torch.tensor(0.8765)
    if model.get("learn_logvar"):
        tensors["logvar"] = torch.randn(1000)
    for prefix, weights in parts.items():
        tensors |= {prefix + leaf: value.float() for leaf, value in weights.items()}
    if model["ema"]:
        tensors["model_ema.decay"] = torch.tensor(0.9999)
        tensors["model_ema.num_updates"] = torch.tensor(77, dtype=torch.int32)
        for leaf, value in averages.items():
            tensors[f"model_ema.diffusion_model{leaf.replace('.', '')}"] = value.float()
    return tensors


def write(tmp_path: Path, name: str, extension: str = "ckpt") -> tuple[Path, Path]:
    weights, config = tmp_path / f"model.{extension}", tmp_path / "model.yaml"
    tensors = make(name)
    if extension == "ckpt":
        # as Lightning writes it
        content = {"state_dict": tensors, "epoch": 3, "global_step": 4, "callbacks": {}}
        torch.save(content, weights)
    else:
        write_single_file(tensors, weights)
    config.write_text(yaml.safe_dump(config_of(MODELS[name])))
    return weights, config


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype
        for name, tensor in first.items()
    )


@pytest.mark.parametrize(
    ("name", "extension"), [*((name, "ckpt") for name in MODELS), ("inpainting", "safetensors")]
)
def test_every_bit_comes_back(name: str, extension: str, tmp_path: Path) -> None:
    path, config = write(tmp_path, name, extension)
    model = LatentDiffusion.from_single_file(path, config=config)
    copied, copied_config = tmp_path / f"copy.{extension}", tmp_path / "copy.yaml"
    model.save_single_file(copied, config_path=copied_config)
    assert same(read_tensors(copied), read_tensors(path))
    again = LatentDiffusion.from_single_file(copied, config=copied_config)
    assert again.unet.config == model.unet.config
    assert again.first_stage.config == model.first_stage.config
    assert again.conditioning == model.conditioning
    assert again.objective.config == model.objective.config
    assert same(again.state_dict(), model.state_dict())
    fields = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    assert all(again.scheduler.config[field] == model.scheduler.config[field] for field in fields)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_parts_compute_what_the_original_does(name: str) -> None:
    tensors = {leaf: value.double() for leaf, value in make(name).items()}
    described = MODELS[name]
    for use_ema in (True, False) if described["ema"] else (False,):
        model = LatentDiffusion.from_single_file(
            tensors, config=config_of(described), use_ema=use_ema, torch_dtype=torch.float64
        )
        weights = Weights()
        for leaf, value in tensors.items():
            if leaf.startswith("model.diffusion_model."):
                short = leaf.removeprefix("model.diffusion_model.")
                average = f"model_ema.diffusion_model{short.replace('.', '')}"
                weights[short] = tensors[average] if use_ema else value
        x, t = normal(2, described["unet"]["in_channels"], 8, 8), torch.tensor([5, 900])
        given: dict[str, Tensor] = {}
        arguments: dict[str, Tensor] = {}
        if "context_dim" in described["unet"]:
            given["context"] = arguments["encoder_hidden_states"] = normal(2, 4, 24)
        if "num_classes" in described["unet"]:
            given["y"] = arguments["class_labels"] = torch.tensor([0, 5])
        expected = unet(weights, described["unet"], x, t, **given)
        actual = model.unet(x, t, **arguments).sample
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_latents_are_scaled_as_in_the_original() -> None:
    tensors = make("none, scale by std")
    model = LatentDiffusion.from_single_file(
        tensors, config=config_of(MODELS["none, scale by std"]), torch_dtype=torch.float64
    )
    stage = Weights()
    for leaf, value in tensors.items():
        if leaf.startswith("first_stage_model."):
            stage[leaf.removeprefix("first_stage_model.")] = value.double()
    image = normal(1, 3, 16, 16)
    mean, logvar = encode(stage, KL["params"], image).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = float(torch.tensor(0.8765)) * (mean + (logvar / 2).exp() * noise)
    actual = model.encode(image, torch.Generator().manual_seed(5))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_conditions_reach_the_unet(tmp_path: Path) -> None:
    kinds = {"class": ClassEmbedder, "text": TextEncoder, "concat": SpatialRescaler}
    for name, kind in kinds.items():
        model = LatentDiffusion.from_single_file(make(name), config=config_of(MODELS[name]))
        assert type(model.conditioner) is kind
    labels = torch.tensor([1, 4])
    model = LatentDiffusion.from_single_file(make("class"), config=config_of(MODELS["class"]))
    images = model.sample(class_labels=labels, num_inference_steps=2, seeds=0)
    assert images.shape == (2, 3, 16, 16)
    model = LatentDiffusion.from_single_file(make("text"), config=config_of(MODELS["text"]))
    assert model.max_caption_length == 7
    ids = torch.randint(0, 11, (2, 7))
    assert model.sample(conditioning=ids, num_inference_steps=2, seeds=0).shape == (2, 3, 16, 16)
    model = LatentDiffusion.from_single_file(
        make("inpainting"), config=config_of(MODELS["inpainting"])
    )
    appended = torch.randn(1, 4, 8, 8)
    assert model.sample(conditioning=appended, num_inference_steps=2, seeds=0).shape[0] == 1


def test_the_other_weights_are_given_back_until_the_model_changes(tmp_path: Path) -> None:
    tensors = make("none")
    for use_ema in (True, False):
        model = LatentDiffusion.from_single_file(
            tensors, config=config_of(MODELS["none"]), use_ema=use_ema
        )
        model = copy.deepcopy(model)
        model.save_single_file(tmp_path / "same.safetensors")
        assert same(read_tensors(tmp_path / "same.safetensors"), tensors)
        with torch.no_grad():
            model.unet.conv_in.bias += 1
        model.save_single_file(tmp_path / "trained.safetensors", ema=None)
        trained = read_tensors(tmp_path / "trained.safetensors")
        assert not any(leaf.startswith("model_ema") for leaf in trained)
        bias = trained["model.diffusion_model.input_blocks.0.0.bias"]
        assert torch.equal(bias, model.unet.conv_in.bias)
        average = copy.deepcopy(model.unet).requires_grad_(False)
        average.conv_in.bias -= 3
        model.save_single_file(tmp_path / "both.safetensors", ema=average)
        both = read_tensors(tmp_path / "both.safetensors")
        assert both.keys() == tensors.keys()
        assert torch.equal(
            both["model_ema.diffusion_modelinput_blocks00bias"], average.conv_in.bias
        )
        assert both["model_ema.num_updates"] == 77


def test_averages_are_read_where_the_config_says_so_or_says_nothing() -> None:
    tensors = make("none")
    raw = tensors["model.diffusion_model.out.2.bias"]
    average = tensors["model_ema.diffusion_modelout2bias"]
    config = config_of(MODELS["none"])
    silent, off = copy.deepcopy(config), copy.deepcopy(config)
    del silent["model"]["params"]["use_ema"]
    off["model"]["params"]["use_ema"] = False

    def bias(config: dict[str, Any] | None, **options: Any) -> Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        model = LatentDiffusion.from_single_file(
            tensors, config=config, scheduler=scheduler, **options
        )
        return model.unet.conv_out.bias

    assert torch.equal(bias(config), average)
    assert torch.equal(bias(silent), average)
    assert torch.equal(bias(off), raw)
    assert torch.equal(bias(off, use_ema=True), average)
    assert torch.equal(bias(config, use_ema=False), raw)
    without = {leaf: v for leaf, v in tensors.items() if not leaf.startswith("model_ema")}
    model = LatentDiffusion.from_single_file(without, config=config)
    assert torch.equal(model.unet.conv_out.bias, raw)
    with pytest.raises(CheckpointError, match="no moving averages"):
        LatentDiffusion.from_single_file(without, config=config, use_ema=True)
    only = {leaf: v for leaf, v in tensors.items() if not leaf.startswith("model.")}
    model = LatentDiffusion.from_single_file(only, config=config)
    assert torch.equal(model.unet.conv_out.bias, average)


def test_a_model_of_our_own_is_written_and_read(tmp_path: Path) -> None:
    source = LatentDiffusion.from_single_file(make("text"), config=config_of(MODELS["text"]))
    own = LatentDiffusion(
        source.first_stage,
        source.unet,
        DDIMScheduler(
            beta_schedule="linear",
            beta_start=0.001,
            beta_end=0.03,
            clip_sample=False,
            prediction_type="v_prediction",
        ),
        source.conditioner,
        conditioning="crossattn",
        scaling_factor=0.5,
    )
    own.save_single_file(tmp_path / "own.ckpt", config_path=tmp_path / "own.yaml")
    read = LatentDiffusion.from_single_file(tmp_path / "own.ckpt", config=tmp_path / "own.yaml")
    assert read.latent_scale.factor == 0.5
    assert read.scheduler.config["beta_schedule"] == "linear"
    assert read.scheduler.config["prediction_type"] == "v_prediction"
    assert same(read.state_dict(), own.state_dict())
    inferred = LatentDiffusion.from_single_file(
        tmp_path / "own.ckpt", unet=source.unet, scheduler=own.scheduler
    )
    assert inferred.conditioning == "crossattn"
    assert inferred.latent_scale.factor == 0.5


def test_through_diffusers_and_back_every_bit_stays(tmp_path: Path) -> None:
    tensors = make("none")
    config = config_of(MODELS["none"])
    model = LatentDiffusion.from_single_file(tensors, config=config, use_ema=False)
    parts = {
        "unet": (model.unet, diffusers.UNet2DModel, "model.diffusion_model."),
        "vqvae": (model.first_stage, diffusers.VQModel, "first_stage_model."),
    }
    for name, (ours, theirs_class, prefix) in parts.items():
        there, back = tmp_path / name, tmp_path / f"{name}-back"
        ours.save_pretrained(there)
        if name == "unet":
            # Two heads are 32 channels each at the one level that has attention.
            theirs = theirs_class.from_pretrained(there, attention_head_dim=32)
        else:
            theirs = theirs_class.from_pretrained(there)
        theirs.save_pretrained(back)
        again = type(ours).from_pretrained(back)
        again.save_single_file(tmp_path / f"{name}.ckpt", prefix=prefix)
        written = read_tensors(tmp_path / f"{name}.ckpt")
        assert same(written, {k: v for k, v in tensors.items() if k.startswith(prefix)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cond_stage_config": {"target": "os.system"}}, ConfigError, "no 'system'; accepted"),
        ({"conditioning_key": "smell"}, ConfigError, "conditioning_key: .*'smell'"),
        ({"beta_schedule": "steep"}, ConfigError, "beta_schedule: .*'steep'"),
        ({"timesteps": 10**9}, ConfigError, "timesteps: expected 1 to"),
        ({"parameterization": "mu"}, ConfigError, "parameterization: .*'mu'"),
        ({"low_scale_config": {"target": "x.Y"}}, ConfigError, "low_scale_config: LatentDiffusion"),
        ({"colour": 1}, ConfigError, "does not know 'colour'"),
        ({"learn_logvar": True}, CheckpointError, "holds no logvar"),
        ({"first_stage_config": "x"}, ConfigError, "first_stage_config: expected a mapping"),
        (
            {"first_stage_config": {"target": "ldm.IdentityFirstStage"}},
            ConfigError,
            "no 'IdentityFirstStage'; accepted",
        ),
        ({"cond_stage_config": "__is_first_stage__"}, CheckpointError, "to be the first stage"),
        ({"loss_type": "l3"}, ConfigError, "loss_type"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = config_of(MODELS["class"])
    config["model"]["params"] |= change
    with pytest.raises(error, match=message):
        LatentDiffusion.from_single_file(make("class"), config=config)


def test_a_file_with_other_parts_is_refused() -> None:
    tensors, config = make("none"), config_of(MODELS["none"])
    with pytest.raises(CheckpointError, match=r"not a whole model.* control\.weight"):
        LatentDiffusion.from_single_file(
            tensors | {"control.weight": torch.zeros(1)}, config=config
        )
    extra = {"cond_stage_model.embedding.weight": torch.zeros(6, 24)}
    with pytest.raises(
        CheckpointError, match=r"no weights of a cond stage, the file has embedding"
    ):
        LatentDiffusion.from_single_file(tensors | extra, config=config)
    with pytest.raises(CheckpointError, match=r"moving averages of no weight.* zzz"):
        LatentDiffusion.from_single_file(
            tensors | {"model_ema.diffusion_modelzzz": torch.zeros(1)}, config=config
        )
    unet_alone = {
        leaf.removeprefix("model.diffusion_model."): value
        for leaf, value in tensors.items()
        if leaf.startswith("model.diffusion_model.")
    }
    with pytest.raises(CheckpointError, match="one part of it"):
        LatentDiffusion.from_single_file(unet_alone, config=config)
    no_schedule = {leaf: value for leaf, value in tensors.items() if "." in leaf}
    inferred = LatentDiffusion.from_single_file(no_schedule, config=config)
    assert inferred.scheduler.config["beta_end"] == 0.0205


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = LatentDiffusion.from_single_file(make("none"), config=config_of(MODELS["none"]))
    with pytest.raises(ConfigError, match=r"ends in \.safetensors or \.ckpt"):
        model.save_single_file(tmp_path / "model.bin")
    shifted = LatentDiffusion(
        model.first_stage,
        model.unet,
        model.scheduler,
        latent_mean=[0.0, 0.1, 0.2],
        latent_std=[1.0, 1.0, 1.0],
    )
    with pytest.raises(ConfigError, match="latent_mean"):
        shifted.save_single_file(tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())
