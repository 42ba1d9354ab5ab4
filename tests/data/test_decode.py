from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from fastldm.data.decode import decode_image, image_size
from fastldm.errors import DataError

Pixels = Callable[..., np.ndarray]


def encode(array: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array.squeeze())
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encode_png16(array: np.ndarray) -> bytes:
    """A 16-bit PNG from the specification: colour type 0, 4, 2 or 6, no filtering."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {"lossless": True})])
def test_lossless_8_bit_files_are_read_exactly(
    pixels: Pixels, channels: int, kind: str, options: dict[str, Any]
) -> None:
    array = pixels(9, 14, channels)
    decoded = decode_image(encode(array, kind, **options), channels)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, array)


def test_jpeg_is_what_pil_reads(pixels: Pixels) -> None:
    data = encode(pixels(16, 24), "jpeg", quality=90)
    np.testing.assert_array_equal(
        decode_image(data, 3), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_png_keeps_every_bit(rng: np.random.Generator, channels: int) -> None:
    array = rng.integers(0, 65536, (9, 7, channels), dtype=np.uint16)
    decoded = decode_image(encode_png16(array), channels)
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("colours", [1, 3])
def test_16_bit_alpha_is_composited_on_white(rng: np.random.Generator, colours: int) -> None:
    array = rng.integers(0, 65536, (5, 6, colours + 1), dtype=np.uint16)
    colour, alpha = array[..., :-1].astype(np.float64), array[..., -1:] / 65535.0
    expected = np.rint(colour * alpha + 65535 * (1 - alpha))
    np.testing.assert_array_equal(decode_image(encode_png16(array), colours), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}])
def test_tiff_of_any_depth_and_channels(
    rng: np.random.Generator, dtype: Any, channels: int, options: dict[str, Any]
) -> None:
    array = rng.random((11, 8, channels))
    if dtype != np.float32:
        array = array * np.iinfo(dtype).max
    array = array.astype(dtype)
    photometric = "rgb" if channels == 3 else "minisblack"
    planar = {"planarconfig": "contig"} if channels == 5 else {}
    data = encode_tiff(array.squeeze(), photometric=photometric, **planar, **options)
    decoded = decode_image(data, channels)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, array)


def test_tiff_planes_and_pages_are_channels(rng: np.random.Generator) -> None:
    planes = rng.integers(0, 65536, (3, 6, 9), dtype=np.uint16)
    expected = planes.transpose(1, 2, 0)
    planar = encode_tiff(planes, photometric="rgb", planarconfig="separate")
    pages = encode_tiff(planes, photometric="minisblack")
    np.testing.assert_array_equal(decode_image(planar, 3), expected)
    np.testing.assert_array_equal(decode_image(pages, 3), expected)


def test_tiff_compression_that_tifffile_lacks_is_left_to_pil(pixels: Pixels) -> None:
    array = pixels(10, 12)
    data = encode(array, "tiff", compression="tiff_lzw")
    np.testing.assert_array_equal(decode_image(data, 3), array)


def test_tiff_min_is_white_is_inverted(pixels: Pixels) -> None:
    array = pixels(4, 5, 1)
    data = encode_tiff(array.squeeze(), photometric="miniswhite")
    np.testing.assert_array_equal(decode_image(data, 1), 255 - array)


def test_tiff_stack_of_colour_images_is_refused(pixels: Pixels) -> None:
    stack = np.stack([pixels(4, 5), pixels(4, 5)])
    with pytest.raises(DataError, match="not one image"):
        decode_image(encode_tiff(stack, photometric="rgb"), 3)


def test_tiff_premultiplied_alpha(pixels: Pixels) -> None:
    alpha = pixels(4, 5, 1)
    colour = (pixels(4, 5) / 255.0 * alpha).astype(np.uint8)
    data = encode_tiff(
        np.concatenate([colour, alpha], axis=2), photometric="rgb", extrasamples=["assocalpha"]
    )
    np.testing.assert_array_equal(decode_image(data, 3), colour + (255 - alpha))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_orientation_is_obeyed(pixels: Pixels, orientation: int, kind: str) -> None:
    array = pixels(8, 16)
    exif = Image.Exif()
    exif[274] = orientation
    if kind == "tiff":
        data = encode_tiff(array, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        turned = Image.fromarray(array)
        turned.getexif()[274] = orientation
        expected = ImageOps.exif_transpose(turned)
    else:
        data = encode(array, kind, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data, 3)
    assert decoded.shape[0] == (16 if orientation >= 5 else 8)
    np.testing.assert_array_equal(decoded, np.asarray(expected))
    assert image_size(data) == decoded.shape[:2]


@pytest.mark.parametrize("channels", [2, 4])
def test_8_bit_alpha_is_composited_on_white(pixels: Pixels, channels: int) -> None:
    array = pixels(9, 14, channels)
    colour, alpha = array[..., :-1].astype(np.float64), array[..., -1:] / 255.0
    expected = np.rint(colour * alpha + 255 * (1 - alpha))
    decoded = decode_image(encode(array, "png"), channels - 1)
    np.testing.assert_array_equal(decoded, expected)


def test_alpha_is_kept_when_the_channels_count_it(pixels: Pixels) -> None:
    array = pixels(9, 14, 4)
    np.testing.assert_array_equal(decode_image(encode(array, "png"), 4), array)


def test_palette_transparency_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, "png", transparency=1), 3)
    np.testing.assert_array_equal(decoded, [[[10, 20, 30], [255, 255, 255]]])


def test_grey_transparency_key_becomes_white() -> None:
    image = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    decoded = decode_image(encode(image, "png", transparency=9), 1)
    np.testing.assert_array_equal(decoded[..., 0], [[7, 255]])


@pytest.mark.parametrize("mode", ["1", "CMYK"])
def test_other_modes_become_grey_or_rgb(pixels: Pixels, mode: str) -> None:
    image = Image.fromarray(pixels(8, 8)).convert(mode)
    data = encode(image, "tiff")
    channels, plain = (1, "L") if mode == "1" else (3, "RGB")
    expected = np.asarray(image.convert(plain)).reshape(8, 8, channels)
    np.testing.assert_array_equal(decode_image(data, channels), expected)


def test_grey_becomes_rgb_and_rgb_becomes_luma(pixels: Pixels) -> None:
    grey, colour = pixels(6, 7, 1), pixels(6, 7)
    np.testing.assert_array_equal(decode_image(grey, 3), np.repeat(grey, 3, axis=2))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(decode_image(colour, 1)[..., 0], luma)
    deep = colour.astype(np.uint16) * 257
    expected = np.rint(deep.astype(np.float64) @ [0.299, 0.587, 0.114])
    np.testing.assert_array_equal(decode_image(deep, 1)[..., 0], expected)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (np.uint8, np.uint8),
        (np.uint16, np.uint16),
        (">u2", np.uint16),
        (np.int16, np.float32),
        (np.uint32, np.float32),
        (np.float16, np.float32),
        (np.float64, np.float32),
    ],
)
def test_npy_of_any_number_type(rng: np.random.Generator, dtype: Any, kept: Any) -> None:
    array = rng.integers(0, 100, (5, 6, 4)).astype(dtype)
    decoded = decode_image(encode_npy(array), 4)
    assert decoded.dtype == kept
    np.testing.assert_array_equal(decoded, array)


def test_npy_without_a_channel_axis_and_of_booleans() -> None:
    array = np.array([[True, False, True]])
    np.testing.assert_array_equal(decode_image(encode_npy(array), 1)[..., 0], [[255, 0, 255]])


def test_npy_with_objects_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    with pytest.raises(ValueError, match="allow_pickle"):
        decode_image(encode_npy(np.array([[Trap()]], dtype=object)), 1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.uint8), r"\[H, W\] or \[H, W, C\], got shape \[5\]"),
        (np.zeros((0, 5), np.uint8), r"got shape \[0, 5\]"),
        (np.zeros((4, 4), np.complex64), "complex64"),
        (np.zeros((4, 4, 5), np.uint8), "channels=5, wanted are channels=3"),
        (np.zeros((3, 4, 5), np.uint8), r"looks like \[C, H, W\]"),
    ],
)
def test_an_array_that_cannot_serve_says_why(array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_image(encode_npy(array), 3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "npy", "png16"])
def test_size_is_read_from_the_header_alone(pixels: Pixels, kind: str, tmp_path: Path) -> None:
    array = pixels(30, 50)
    encoders: dict[str, Callable[[], bytes]] = {
        "npy": lambda: encode_npy(array),
        "tiff": lambda: encode_tiff(array, photometric="rgb"),
        "png16": lambda: encode_png16(array.astype(np.uint16)),
    }
    data = encoders.get(kind, lambda: encode(array, kind))()
    path = tmp_path / "image"
    path.write_bytes(data)
    assert image_size(data) == image_size(path) == image_size(array) == (30, 50)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "npy", "png16", "text"])
def test_a_damaged_file_raises(pixels: Pixels, kind: str) -> None:
    array = pixels(64, 64)
    encoders: dict[str, Callable[[], bytes]] = {
        "npy": lambda: encode_npy(array),
        "tiff": lambda: encode_tiff(array, photometric="rgb"),
        "png16": lambda: encode_png16(array.astype(np.uint16)),
        "text": lambda: b"not an image at all" * 9,
    }
    data = encoders.get(kind, lambda: encode(array, kind))()
    with pytest.raises((OSError, ValueError, RuntimeError)):
        decode_image(data[: len(data) // 2], 3)
