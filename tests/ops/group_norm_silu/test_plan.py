"""How [B, C, pixels] is cut: everything is covered, little is padded, a GPU is filled."""

from __future__ import annotations

import pytest

from fastldm.ops.group_norm_silu import plan

# Channels and pixels of autoencoders and UNets at batch 1, 32 groups each.
SIZES = [
    (128, 512 * 512), (256, 256 * 256), (512, 64 * 64), (160, 64 * 64), (192, 64 * 64),
    (224, 64 * 64), (320, 64 * 64), (448, 32 * 32), (640, 32 * 32), (960, 32 * 32),
    (1280, 16 * 16), (1920, 16 * 16), (2560, 16 * 16),
]  # fmt: skip
KERNELS = ["moments", "apply", "bwd_sums", "bwd_apply"]


def _sizes(channels: int, pixels: int, inner: bool, itemsize: int = 2) -> plan.Sizes:
    return plan.Sizes(1, channels, pixels, 32, inner, itemsize)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize(("channels", "pixels"), SIZES)
def test_pieces_cover_everything_without_padding(
    channels: int, pixels: int, inner: bool, kernel: str
) -> None:
    cut = plan.split(kernel, "default", _sizes(channels, pixels, inner))
    assert cut.blocks_c * cut.block_c == channels
    assert cut.span % cut.block_p == 0
    assert (cut.splits - 1) * cut.span < pixels <= cut.splits * cut.span
    neighbours = cut.block_c if inner else cut.block_p
    assert neighbours >= 32, "64 bytes in half precision"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize(("channels", "pixels"), SIZES)
def test_one_sample_fills_a_gpu(channels: int, pixels: int, inner: bool, kernel: str) -> None:
    cut = plan.split(kernel, "default", _sizes(channels, pixels, inner))
    smallest = cut.block_p * cut.block_c
    assert cut.splits * cut.blocks_c >= min(132, channels * pixels // smallest)


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ((100, 65 * 63, True), (16, 128)),
        ((320, 65 * 63, False), (2048, 1)),
        ((6, 35, True), (64, 8)),
        ((6, 35, False), (64, 8)),
        ((40, 1, True), (1, 64)),
    ],
)
def test_odd_sizes_are_padded_up(sizes: tuple[int, int, bool], blocks: tuple[int, int]) -> None:
    channels, pixels, inner = sizes
    cut = plan.split("moments", "default", plan.Sizes(1, channels, pixels, 1, inner, 2))
    assert (cut.block_p, cut.block_c) == blocks


@pytest.mark.parametrize(
    ("channels", "itemsize", "groups"),
    [(128, 2, 8), (160, 2, 8), (192, 2, 8), (224, 2, 8), (320, 2, 4), (320, 4, 4), (640, 2, 2),
     (960, 2, 4), (1280, 2, 1), (1920, 2, 2), (2560, 2, 1)],
)  # fmt: skip
def test_groups_of_a_tile_begin_at_a_vector(channels: int, itemsize: int, groups: int) -> None:
    tiles = plan.whole("fwd", "default", _sizes(channels, 64, True, itemsize))
    assert tiles is not None
    assert tiles.groups == groups
    assert groups * (channels // 32) * itemsize % 16 == 0
    assert groups * (channels // 32) * itemsize >= 64


def test_a_group_is_whole_where_it_fits() -> None:
    for channels, pixels, fits in [(1280, 256, True), (1280, 1024, False), (128, 2**18, False)]:
        for inner in (True, False):
            tiles = plan.whole("fwd", "default", _sizes(channels, pixels, inner))
            assert (tiles is not None) == fits
            if tiles is not None:
                assert tiles.block_p >= pixels
                assert tiles.block_c >= tiles.groups * channels // 32


def test_what_was_measured_on_a_device_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"default": {"fwd": {"elements": 1, "num_warps": 2}}, "sm_1": {"fwd": {"elements": 3}}}'
    monkeypatch.setattr(plan.Path, "read_text", lambda *_, **__: text)
    configs = plan._configs.__wrapped__
    assert configs("sm_1") == {"fwd": {"elements": 3, "num_warps": 2}}
    assert configs("sm_2") == {"fwd": {"elements": 1, "num_warps": 2}}
