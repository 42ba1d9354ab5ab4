"""Remapped indices against taming-transformers' formulas, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastldm import VQModel
from fastldm.errors import ConfigError
from fastldm.modules.quantize import VectorQuantizer

CODES, USED = 11, [7, 2, 9, 4]


def quantizer(**options) -> VectorQuantizer:
    torch.manual_seed(0)
    module = VectorQuantizer(CODES, 3, used=USED, **options).double()
    torch.nn.init.normal_(module.embedding.weight)
    return module


def remapped(indices: np.ndarray, unknown: np.ndarray | int) -> np.ndarray:
    """Where each index stands among the used ones; `unknown` where it is not."""
    matches = indices[..., None] == np.array(USED)
    return np.where(matches.any(-1), matches.argmax(-1), unknown)


def nearest(z: torch.Tensor, module: VectorQuantizer) -> np.ndarray:
    rows, codes = z.movedim(1, -1).numpy(), module.embedding.weight.detach().numpy()
    return ((rows[..., None, :] - codes) ** 2).sum(-1).argmin(-1)


@pytest.mark.parametrize(("unknown_index", "number"), [("extra", 4), (0, 0), (3, 3)])
def test_indices_count_the_used_codes(unknown_index, number):
    module = quantizer(unknown_index=unknown_index)
    z = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    output = module(z)
    codes = nearest(z, module)
    assert output.indices.shape == (2, 5, 6)
    np.testing.assert_array_equal(output.indices.numpy(), remapped(codes, number))
    assert module.num_indices == 4 + (unknown_index == "extra")
    # Only the indices change: the lookup has all codes.
    assert torch.equal(output.z_q.movedim(1, -1), module.embedding.weight[torch.from_numpy(codes)])
    assert set(np.unique(codes)) - set(USED)


def test_random_indices_are_those_that_taming_draws():
    """torch.randint(0, n, the number of unknown indices), in the order of the indices."""
    module = quantizer()
    indices = torch.arange(CODES).repeat(2, 1)
    unknown = ~torch.isin(indices, torch.tensor(USED))
    torch.manual_seed(5)
    expected = torch.randint(0, len(USED), (int(unknown.sum()),))
    torch.manual_seed(5)
    found = module.remap_to_used(indices)
    assert torch.equal(found[unknown], expected)
    assert torch.equal(found[~unknown], torch.from_numpy(remapped(indices.numpy(), 0))[~unknown])


def test_entries_are_those_of_the_used_codes():
    module = quantizer(unknown_index="extra")
    positions = torch.tensor([[3, 0, 4], [2, 2, 1]])
    codes = torch.tensor([[4, 7, 7], [9, 9, 2]])
    assert torch.equal(module.unmap_to_all(positions), codes)
    assert torch.equal(module.get_codebook_entry(positions), module.embedding(codes))
    entries = module.get_codebook_entry(positions.flatten(), (2, 1, 3, 3))
    assert torch.equal(entries, module.embedding(codes).permute(0, 2, 1)[:, :, None])


def test_a_code_listed_twice_has_its_first_position():
    module = VectorQuantizer(CODES, 3, used=[5, 1, 5, 1], unknown_index="extra")
    assert module.remap_to_used(torch.tensor([1, 5, 6])).tolist() == [1, 0, 4]


def test_used_codes_are_saved_with_the_model(tmp_path):
    model = VQModel(
        block_out_channels=(32,),
        latent_channels=4,
        num_vq_embeddings=CODES,
        num_used_embeddings=4,
        unknown_index="extra",
    )
    assert model.quantize.used.tolist() == [0, 1, 2, 3]
    model.quantize.used.copy_(torch.tensor(USED))
    model.save_pretrained(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.quantize.used.tolist() == USED
    assert loaded.quantize.num_indices == 5
    image = torch.rand(1, 3, 8, 8)
    assert "quantize.used" not in VQModel(block_out_channels=(32,)).state_dict()
    assert model(image).sample.shape == image.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"used": [1, 11]}, "used: expected code indices from 0 to 10, got 1 to 11"),
        ({"used": []}, "used: expected code indices"),
        ({"used": torch.ones(2)}, "used: expected code indices"),
        ({"used": [[1]]}, r"used: .* \[1, 1\]"),
        ({"unknown_index": "other"}, "unknown_index: .* got 'other'"),
        ({"unknown_index": -1}, "unknown_index: .* got -1"),
        ({"unknown_index": True}, "unknown_index: .* got True"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        VectorQuantizer(CODES, 3, **options)


def test_number_of_used_codes_is_checked():
    for count in (0, 12, True, "all"):
        with pytest.raises(ConfigError, match="num_used_embeddings"):
            VQModel(block_out_channels=(32,), num_vq_embeddings=CODES, num_used_embeddings=count)
