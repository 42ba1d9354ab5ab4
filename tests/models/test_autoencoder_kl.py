"""AutoencoderKL against diffusers', float64 and itself."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.models import AutoencoderKL, VQModel
from fastldm.storage import load_weights, save_weights

DOWN, ATTN_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, ATTN_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"

PLAIN = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": (DOWN,) * 3,
    "up_block_types": (UP,) * 3,
    "norm_num_groups": 4,
    "sample_size": 16,
}
CONFIGS = {
    "plain": PLAIN,
    "two layers, no attention": {**PLAIN, "layers_per_block": 2, "mid_block_add_attention": False},
    "attention in levels": {
        **PLAIN,
        "down_block_types": (DOWN, DOWN, ATTN_DOWN),
        "up_block_types": (ATTN_UP, UP, UP),
    },
    "16 channels, no quant convs, shifted": {
        **PLAIN,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "force_upcast": True,
    },
    "one level, other channels": {
        "block_out_channels": (8,),
        "in_channels": 1,
        "out_channels": 1,
        "norm_num_groups": 2,
        "act_fn": "relu",
    },
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def pair(config, tmp_path) -> tuple[diffusers.AutoencoderKL, AutoencoderKL]:
    """diffusers' model with random weights and biases, and ours loaded from its folder."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    return theirs, AutoencoderKL.from_pretrained(tmp_path)


def images(config, size: int = 16, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.get("in_channels", 3), size, size + 8, generator=generator)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def gradients(model, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a random projection of the reconstruction and of the posterior."""
    model.zero_grad()
    posterior = model.encode(x).latent_dist
    outputs = (model.decode(posterior.mean).sample, posterior.parameters)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    torch.autograd.backward(outputs, upstream)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_outputs_are_diffusers_outputs(config, tmp_path):
    theirs, ours = pair(config, tmp_path)
    x = images(config)
    with torch.no_grad():
        expected, given = theirs.encode(x).latent_dist, ours.encode(x).latent_dist
        assert relative_error(given.parameters, expected.parameters) < 1e-5
        assert relative_error(given.std, expected.std) < 1e-5
        assert relative_error(given.kl(), expected.kl()) < 1e-5
        z = expected.mode()
        assert relative_error(ours.decode(z).sample, theirs.decode(z).sample) < 1e-5
        sampled = [
            model(x, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample
            for model in (ours, theirs)
        ]
        assert relative_error(*sampled) < 1e-5
        assert torch.equal(ours(x).sample, ours(x, return_dict=False)[0])


def test_gradients_are_diffusers_gradients(config, tmp_path):
    theirs, ours = pair(config, tmp_path)
    expected, given = gradients(theirs, images(config)), gradients(ours, images(config))
    assert given.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias before a norm has a gradient that is zero but for rounding.
        error = float((given[name] - gradient).abs().max())
        assert error < 1e-4 * float(gradient.abs().max()) + 1e-6 * largest, name


def test_float64_agrees_with_diffusers_to_rounding(config, tmp_path):
    theirs, ours = pair(config, tmp_path)
    x = images(config).double()
    with torch.no_grad():
        assert relative_error(ours.double()(x).sample, theirs.double()(x).sample) < 1e-12


def test_float32_is_as_near_to_float64_as_diffusers_is(config, tmp_path):
    theirs, ours = pair(config, tmp_path)
    x = images(config)
    with torch.no_grad():
        single, their_single = ours(x).sample, theirs(x).sample
        exact = theirs.double()(x.double()).sample
    assert relative_error(single, exact) < 2 * relative_error(their_single, exact) + 1e-6


def test_diffusers_loads_what_is_saved(config, tmp_path):
    torch.manual_seed(4)
    ours = AutoencoderKL(**config).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    x = images(config)
    with torch.no_grad():
        assert relative_error(ours(x).sample, theirs.eval()(x).sample) < 1e-5
    for name in set(ours.config) - ours.extension_fields:
        value, expected = ours.config[name], theirs.config[name]
        assert value == (list(expected) if isinstance(expected, tuple) else expected), name


def test_the_stable_diffusion_autoencoder_has_diffusers_keys_and_shapes():
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": (DOWN,) * 4,
        "up_block_types": (UP,) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**config), diffusers.AutoencoderKL(**config)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert ours.num_parameters() == 83_653_863


FIRST_STAGES = {
    "kl-f4": ((1, 2, 4), (), 3, None, 55.31),
    "kl-f8": ((1, 2, 4, 4), (), 4, None, 83.65),
    "kl-f16": ((1, 1, 2, 2, 4), (4,), 16, None, 69.61),
    "kl-f32": ((1, 1, 2, 2, 4, 4), (4, 5), 64, None, 103.88),
    "vq-f4": ((1, 2, 4), (), 3, 8192, 55.32),
    "vq-f4-noattn": ((1, 2, 4), None, 3, 8192, 53.22),
    "vq-f8": ((1, 2, 2, 4), (3,), 4, 16384, 67.72),
    "vq-f8-n256": ((1, 2, 2, 4), (3,), 4, 256, 67.65),
    "vq-f16": ((1, 1, 2, 2, 4), (4,), 8, 16384, 69.59),
}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_the_published_first_stages_have_their_parameter_counts(name):
    multipliers, attention_levels, channels, codes, millions = FIRST_STAGES[name]
    attention = [i in (attention_levels or ()) for i in range(len(multipliers))]
    config = {
        "block_out_channels": [128 * multiplier for multiplier in multipliers],
        "down_block_types": [ATTN_DOWN if here else DOWN for here in attention],
        "up_block_types": [ATTN_UP if here else UP for here in reversed(attention)],
        "layers_per_block": 2,
        "latent_channels": channels,
        "mid_block_add_attention": attention_levels is not None,
    }
    with torch.device("meta"):
        if codes is None:
            model = AutoencoderKL(**config)
        else:
            model = VQModel(num_vq_embeddings=codes, **config)
    assert round(model.num_parameters() / 1e6, 2) == millions
    assert model.downsampling_factor == 2 ** (len(multipliers) - 1)
    assert model.latent_channels == channels


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIGS["attention in levels"]).train()
    x = images(PLAIN)
    expected = gradients(model, x)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.enable_gradient_checkpointing()
    calls = []
    model.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    given = gradients(model, x)
    assert len(calls) == 2
    assert all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize("regularization", ["kl", "none"])
def test_encode_and_decode_compile_without_a_graph_break(regularization):
    torch.manual_seed(0)
    model = AutoencoderKL(**PLAIN, latent_regularization=regularization).eval()
    encode = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    x = images(PLAIN)
    with torch.no_grad():
        posterior = encode(x).latent_dist
        expected = model.encode(x).latent_dist
        assert relative_error(posterior.mode(), expected.mode()) < 1e-5
        assert torch.equal(posterior.kl(), expected.kl())
        z = expected.mode()
        assert relative_error(decode(z).sample, model.decode(z).sample) < 1e-5


def test_a_plain_autoencoder_has_no_posterior(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(**PLAIN, latent_regularization="none").eval()
    assert model.encoder.conv_out.out_channels == 4
    assert model.quant_conv.weight.shape == (4, 4, 1, 1)
    x = images(PLAIN)
    posterior = model.encode(x).latent_dist
    assert torch.equal(posterior.sample(), posterior.mode())
    assert torch.equal(posterior.kl(), torch.zeros(2))
    assert torch.equal(posterior.std, torch.zeros_like(posterior.mean))
    assert torch.equal(model(x, sample_posterior=True).sample, model(x).sample)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path)(x).sample, model(x).sample)


def test_the_latents_may_have_another_width_than_the_encoder_gives():
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        embed_dim=2,
    )
    assert model.latent_channels == 2
    posterior = model.encode(torch.randn(1, 3, 8, 8)).latent_dist
    assert posterior.mean.shape == (1, 2, 4, 4)
    assert model.decode(posterior.mean).sample.shape == (1, 3, 8, 8)
    with pytest.raises(ConfigError, match="embed_dim: 2 where latent_channels is 4 needs"):
        AutoencoderKL(latent_channels=4, embed_dim=2, use_quant_conv=False)


def test_the_output_activation_bounds_the_image():
    torch.manual_seed(0)
    model = AutoencoderKL(**PLAIN, output_activation="tanh").eval()
    plain = AutoencoderKL(**PLAIN).eval()
    plain.load_state_dict(model.state_dict())
    z = 100 * torch.randn(1, 4, 4, 4)
    assert torch.equal(model.decode(z).sample, plain.decode(z).sample.tanh())


def test_the_last_layer_is_the_decoder_s_output_convolution():
    model = AutoencoderKL(**PLAIN)
    assert model.last_layer is model.decoder.conv_out.weight


def test_weights_of_another_architecture_are_refused(tmp_path):
    AutoencoderKL(**PLAIN).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"up_blocks\.0\.attentions"):
        AutoencoderKL.from_pretrained(tmp_path, up_block_types=(ATTN_UP, UP, UP))
    with pytest.raises(CheckpointError, match="in the model"):
        AutoencoderKL.from_pretrained(tmp_path, latent_channels=5)


def test_attention_weights_under_diffusers_old_names_are_read(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIGS["attention in levels"]).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / model.weights_name
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old_state = {}
    for name, tensor in load_weights(path).items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        old_state[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old_state
    save_weights(old_state, path)
    loaded = AutoencoderKL.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": (DOWN,)}, "down_block_types: 1 block types for 3"),
        ({"up_block_types": (UP, UP, "Up")}, "up_block_types: expected .* got 'Up'"),
        ({"block_out_channels": (), "down_block_types": ()}, "down_block_types"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"act_fn": "sine"}, "act_fn"),
        ({"latent_regularization": "l2"}, "latent_regularization"),
        ({"output_activation": "relu"}, "output_activation"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKL(**{**PLAIN, **change})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 18), "multiples of f = 4, got 16×18"),
        ((1, 3, 0, 16), "multiples of f = 4"),
        ((1, 1, 16, 16), r"expected \[B, 3, H, W\]"),
        ((3, 16, 16), r"got \[3, 16, 16\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(DataError, match=message):
        AutoencoderKL(**PLAIN).encode(torch.zeros(shape))


def test_latents_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"expected \[B, 4, h, w\], got \[1, 3, 4, 4\]"):
        AutoencoderKL(**PLAIN).decode(torch.zeros(1, 3, 4, 4))


def test_half_precision_and_autocast_run():
    torch.manual_seed(0)
    model = AutoencoderKL(**PLAIN).eval()
    x = images(PLAIN)
    with torch.no_grad():
        exact = model(x).sample
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x).sample
        low = model.bfloat16()(x.bfloat16()).sample
    assert low.dtype == torch.bfloat16
    assert relative_error(mixed, exact) < 0.1
    assert relative_error(low, exact) < 0.1
