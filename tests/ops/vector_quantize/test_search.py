"""The C++ searches, on every instruction set of this processor: the reference's indices to the bit.

Which search runs is chosen from the sizes: a tree of boxes for many narrow codes, scores of one
code after another for few, and a screened matrix product for wide ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastldm.ops import _extension, backend, vector_quantize

INSTRUCTION_SETS = [] if _extension.problem() else _extension.extension().instruction_sets()
TREE, NARROW, WIDE = (3, 3000, 9600), (6, 40, 480), (24, 500, 384)
"""Depth, codes, latents."""
TREES = [(1, 3000), (2, 3000), (3, 3000), (4, 4000), (5, 5000), (6, 7000), (7, 10000), (8, 14000)]
"""Depth and codes for which a tree is chosen."""
_CHECKED = 4000

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason=str(_extension.problem()))


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    module = _extension.extension()
    module.use_instruction_set(request.param)
    yield
    module.use_instruction_set(INSTRUCTION_SETS[0])


def _random(depth: int, codes: int, latents: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(depth + codes + latents)
    z = torch.randn(1, depth, latents, generator=generator)
    return z, torch.randn(codes, depth, generator=generator)


def _assert_as_reference(z: Tensor, codebook: Tensor) -> Tensor:
    """Of so many latents as the slow reference can serve, the first and the last among them."""
    with backend("cpp"):
        found = vector_quantize(z, codebook).indices
    latents = z.shape[2]
    near = torch.arange(0, latents, max(1, latents // _CHECKED))
    chosen = torch.cat([near, torch.arange(max(0, latents - 100), latents)]).unique()
    with backend("reference"):
        expected = vector_quantize(z[..., chosen], codebook).indices
    assert torch.equal(found[:, chosen], expected)
    return found


@pytest.mark.parametrize(
    ("sizes", "search"), [(TREE, "tree"), (NARROW, "narrow screen"), (WIDE, "screen")]
)
def test_each_search_is_tried(sizes: tuple[int, int, int], search: str) -> None:
    depth, codes, latents = sizes
    assert _extension.extension().fastest_search(codes, depth, latents) == search


@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("codes", [17, 64, 65, 700])
def test_narrow_latents(depth: int, codes: int) -> None:
    _assert_as_reference(*_random(depth, codes, 4000))


@pytest.mark.parametrize(("depth", "codes"), TREES)
def test_trees(depth: int, codes: int) -> None:
    latents = 9600
    assert _extension.extension().fastest_search(codes, depth, latents) == "tree"
    _assert_as_reference(*_random(depth, codes, latents))


@pytest.mark.parametrize("depth", [9, 16, 31, 64, 257])
@pytest.mark.parametrize("codes", [2, 16, 33, 500])
def test_wide_latents(depth: int, codes: int) -> None:
    _assert_as_reference(*_random(depth, codes, 200))


@pytest.mark.parametrize("sizes", [TREE, NARROW, WIDE])
@pytest.mark.parametrize("latents", [1, 5, 95, 96, 97])
def test_every_remainder_of_a_tile(sizes: tuple[int, int, int], latents: int) -> None:
    z, codebook = _random(*sizes)
    _assert_as_reference(torch.cat([z, z[..., :latents]], 2), codebook)
    _assert_as_reference(z[..., :latents], codebook)


@pytest.mark.parametrize("sizes", [TREE, NARROW, WIDE])
def test_ties_within_a_rounding_error(sizes: tuple[int, int, int]) -> None:
    depth, codes, latents = sizes
    generator = torch.Generator().manual_seed(1)
    z = 1 + torch.randint(0, 8, (1, depth, latents), generator=generator) * 2.0**-22
    codebook = 1 + torch.randint(0, 8, (codes, depth), generator=generator) * 2.0**-22
    _assert_as_reference(z, codebook)


@pytest.mark.parametrize("sizes", [TREE, NARROW, WIDE])
def test_a_code_that_occurs_again_is_never_chosen(sizes: tuple[int, int, int]) -> None:
    z, codebook = _random(*sizes)
    indices = _assert_as_reference(z, codebook.repeat(3, 1))
    assert indices.max() < len(codebook)


@pytest.mark.parametrize("sizes", [TREE, NARROW, WIDE])
@pytest.mark.parametrize("offset", [1e2, 1e6])
def test_large_common_offset(sizes: tuple[int, int, int], offset: float) -> None:
    z, codebook = _random(*sizes)
    _assert_as_reference(z + offset, codebook + offset)


@pytest.mark.parametrize("sizes", [TREE, NARROW, WIDE, (256, 1024, 300)])
def test_codes_far_nearer_to_one_another_than_to_the_latents(sizes: tuple[int, int, int]) -> None:
    """As a codebook begins: uniform in ±1/K."""
    z, codebook = _random(*sizes)
    _assert_as_reference(z, codebook.clamp(-1, 1) / len(codebook))


@pytest.mark.parametrize("sizes", [TREE, NARROW, WIDE])
def test_infinite_and_overflowing_values(sizes: tuple[int, int, int]) -> None:
    z, codebook = _random(*sizes)
    codebook[3] = torch.inf
    codebook[5, 0] = -torch.inf
    codebook[8] = 1e25
    z[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 1e25, -3e38])
    z[0, 1, 4] = torch.inf
    indices = _assert_as_reference(z, codebook)
    assert indices[0, :2].tolist() == [0, 0]
    _assert_as_reference(z * 1e30, codebook * 1e30)
    _assert_as_reference(z * 1e-30, codebook * 1e-30)
    _assert_as_reference(z, codebook[:1].repeat(len(codebook), 1))


@pytest.mark.parametrize("sizes", [TREE, NARROW, WIDE, (256, 1024, 300)])
def test_nearest_in_float64(sizes: tuple[int, int, int]) -> None:
    z, codebook = _random(*sizes)
    with backend("cpp"):
        indices = vector_quantize(z, codebook).indices[0]
    distances = torch.cdist(
        z[0].T.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    chosen = distances.gather(1, indices[:, None])[:, 0]
    # Each of D + 2 roundings of a distance is off by 2⁻²⁴ at most, and two distances are compared.
    bound = 1 + 2.1 * (sizes[0] + 2) * 2.0**-24
    assert (chosen <= distances.amin(1) * bound).all()
    assert (indices == distances.argmin(1)).float().mean() > 0.99


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="no kernels for the instruction set mmx"):
        _extension.extension().use_instruction_set("mmx")
