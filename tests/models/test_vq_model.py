"""VQModel against diffusers', and what it adds."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastldm.errors import ConfigError, DataError
from fastldm.models import VQModel

CONFIGS = {
    "plain": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "num_vq_embeddings": 24,
    },
    "attention, codes of another width": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "num_vq_embeddings": 24,
        "latent_channels": 4,
        "vq_embed_dim": 6,
        "mid_block_add_attention": False,
    },
    "MoVQ": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "num_vq_embeddings": 24,
        "latent_channels": 4,
        "norm_type": "spatial",
    },
}
PLAIN = CONFIGS["plain"]


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path) -> tuple[diffusers.VQModel, VQModel]:
    torch.manual_seed(0)
    theirs = diffusers.VQModel(**CONFIGS[request.param]).eval()
    torch.nn.init.normal_(theirs.quantize.embedding.weight, 0.0, 0.5)
    theirs.save_pretrained(tmp_path)
    return theirs, VQModel.from_pretrained(tmp_path)


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@torch.no_grad()
def test_outputs_are_diffusers_outputs(pair):
    theirs, ours = pair
    x = images()
    latents = theirs.encode(x).latents
    assert relative_error(ours.encode(x).latents, latents) < 1e-5
    assert torch.equal(ours.encode(x, return_dict=False)[0], ours.encode(x).latents)
    expected, given = theirs.decode(latents), ours.decode(latents)
    assert relative_error(given.sample, expected.sample) < 1e-5
    assert relative_error(given.commit_loss, expected.commit_loss) < 1e-5
    expected, given = (m.decode(latents, force_not_quantize=True) for m in pair)
    assert relative_error(given.sample, expected.sample) < 1e-5
    assert torch.equal(given.commit_loss, expected.commit_loss)
    sample, commit_loss = ours(x, return_dict=False)
    assert relative_error(sample, theirs(x).sample) < 1e-5
    assert relative_error(commit_loss, theirs(x).commit_loss) < 1e-5


def test_gradients_are_diffusers_gradients(pair):
    gradients = []
    for model in pair:
        output = model(images())
        upstream = torch.randn(output.sample.shape, generator=torch.Generator().manual_seed(2))
        torch.autograd.backward((output.sample, output.commit_loss), (upstream, torch.tensor(7.0)))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    expected, given = gradients
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((given[name] - gradient).abs().max())
        assert error < 1e-4 * float(gradient.abs().max()) + 1e-6 * largest, name


@torch.no_grad()
def test_diffusers_loads_what_is_saved(pair, tmp_path):
    pair[1].save_pretrained(tmp_path / "ours")
    theirs, report = diffusers.VQModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert relative_error(theirs.eval()(images()).sample, pair[1](images()).sample) < 1e-5


@torch.no_grad()
def test_indices_are_decoded_through_the_codebook(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.VQModel(**PLAIN, lookup_from_codebook=True).eval()
    theirs.save_pretrained(tmp_path)
    ours = VQModel.from_pretrained(tmp_path)
    indices = ours.quantize(ours.encode(images()).latents).indices
    shape = (*indices.shape, 3)
    given = ours.decode(indices.flatten(), force_not_quantize=True, shape=shape).sample
    expected = theirs.decode(indices.flatten(), force_not_quantize=True, shape=shape).sample
    assert relative_error(given, expected) < 1e-5
    assert relative_error(given, ours(images()).sample) < 1e-5


@torch.no_grad()
def test_encode_gives_latents_before_quantisation():
    torch.manual_seed(0)
    model = VQModel(**PLAIN).eval()
    latents = model.encode(images()).latents
    quantized = model.quantize(latents)
    assert not torch.equal(latents, quantized.z_q)
    sample = model.decode(latents).sample
    assert torch.equal(sample, model.decode(quantized.z_q, force_not_quantize=True).sample)


def test_the_options_add_their_buffers_and_only_they_do(tmp_path):
    names = set(VQModel(**PLAIN).state_dict())
    assert names == set(diffusers.VQModel(**PLAIN).state_dict())
    options = {
        "codebook_ema_decay": 0.9,
        "dead_code_threshold": 0.5,
        "codebook_initialization": "data",
    }
    model = VQModel(**PLAIN, **options).train()
    added = {"quantize.ema_counts", "quantize.ema_sums", "quantize.data_initialized"}
    assert set(model.state_dict()) - names == added
    model(images())
    model.save_pretrained(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path)
    assert loaded.quantize.data_initialized
    assert not loaded.quantize.embedding.weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_training_with_moving_averages_moves_the_codebook_by_no_gradient():
    torch.manual_seed(0)
    model = VQModel(**PLAIN, codebook_ema_decay=0.9, dead_code_threshold=0.5).train()
    before = model.quantize.embedding.weight.clone()
    output = model(images())
    (output.sample.square().mean() + output.commit_loss).backward()
    assert model.quantize.embedding.weight.grad is None
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    assert not torch.equal(model.quantize.embedding.weight, before)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = VQModel(**PLAIN).train()
        if enabled:
            model.enable_gradient_checkpointing()
        output = model(images())
        upstream = torch.randn(output.sample.shape, generator=torch.Generator().manual_seed(2))
        torch.autograd.backward((output.sample, output.commit_loss), (upstream, torch.tensor(1.0)))
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_encode_and_decode_compile_without_a_graph_break():
    torch.manual_seed(0)
    model = VQModel(**PLAIN).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(images()).sample, model(images()).sample) < 1e-5


def test_sizes_are_properties():
    model = VQModel(**CONFIGS["attention, codes of another width"])
    assert (model.downsampling_factor, model.latent_channels) == (2, 6)
    assert model.last_layer is model.decoder.conv_out.weight


def test_what_does_not_fit_is_refused():
    model = VQModel(**PLAIN)
    with pytest.raises(DataError, match="multiples of f = 2, got 16×15"):
        model.encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(DataError, match=r"expected \[B, 3, h, w\], got \[1, 4, 2, 2\]"):
        model.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ConfigError, match="norm_type: expected 'group' or 'spatial', got 'layer'"):
        VQModel(**PLAIN, norm_type="layer")
    with pytest.raises(ConfigError, match="wants latent_channels = 4, got 5"):
        VQModel(**CONFIGS["MoVQ"], vq_embed_dim=5)
    with pytest.raises(ConfigError, match="codebook_ema_decay"):
        VQModel(**PLAIN, codebook_ema_decay=1.0)
